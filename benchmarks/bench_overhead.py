"""What HTTP and Ray Serve add to the first token of an idle server.

    python -m benchmarks.bench_overhead --base-url http://127.0.0.1:8000/v1

Asks a running server and an engine in this process the same one-token question in turn, and
compares the medians. Both compute the same on the same machine, one at a time.
"""

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import httpx

from benchmarks.environment import write_json
from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.generation import ChatPrompt, GenerationRequest, SamplingParams
from gemma_serve.messages import ChatMessage, Role, TextPart


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo", help="the model that the server has")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    served, in_process = asyncio.run(_measure(args.base_url, args.model, args.rounds))
    added = statistics.median(s - i for s, i in zip(served, in_process, strict=True))
    results = {
        "served_ttft_ms": statistics.median(served),
        "in_process_ttft_ms": statistics.median(in_process),
        "added_ms": added,
        "rounds": args.rounds,
    }
    for name, value in results.items():
        print(f"{name:20} {value:8.1f}")
    if args.json:
        write_json(args.json, results)


async def _measure(base_url: str, model: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token, served and in this process."""
    generator = GemmaGenerator.load(ModelConfig(model=model), EngineConfig())
    served, in_process = [], []
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as http:
        name = (await http.get("/models")).json()["data"][0]["id"]
        for round_index in range(rounds + 3):  # the first three warm up
            question = f"Question {round_index}: what is the capital of France?"
            pair = await _ttft_served(http, name, question), await _ttft(generator, question)
            if round_index >= 3:
                served.append(pair[0])
                in_process.append(pair[1])
    generator.close()
    return served, in_process


async def _ttft_served(http: httpx.AsyncClient, model: str, question: str) -> float:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begin, first = perf_counter(), None
    async with http.stream("POST", "/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            # The role comes first, at once; the token comes with content or the finish reason.
            if first is None and line.startswith("data: {") and '"role"' not in line:
                first = perf_counter()
    assert first is not None
    return (first - begin) * 1000


async def _ttft(generator: GemmaGenerator, question: str) -> float:
    request = GenerationRequest(
        request_id="benchmark",
        prompt=ChatPrompt((ChatMessage(Role.USER, (TextPart(question),)),)),
        sampling=SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    )
    begin = perf_counter()
    async with await generator.generate(request) as stream:
        await anext(stream)
        return (perf_counter() - begin) * 1000


if __name__ == "__main__":
    main()
