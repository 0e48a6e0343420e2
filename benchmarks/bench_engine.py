"""Tokens per second of the engine alone, beside transformers' ``generate``; no HTTP, no Ray.

    python -m benchmarks.bench_engine --model demo --concurrency 1 8

Every round measures all contenders on the same prompts, one after another, so that a machine whose
speed drifts still gives fair ratios. Greedy, fixed output length, no prompt twice.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from transformers import GenerationConfig

from benchmarks.environment import write_json
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.generation import SamplingParams

Prompts = Sequence[tuple[int, ...]]
Contender = Callable[[Prompts], tuple[float, float | None]]
"""Measures one round: ``(tokens_per_s, ttft_s)``."""


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds."""

    contender: str
    tokens_per_s: float
    ttft_s: float | None
    """Time to the first token, averaged over requests that all come at once."""
    ratio_to_first: float
    """Tokens per second over those of the first contender, median of the rounds' ratios."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    contenders = _contenders(args)
    rounds: list[dict[str, tuple[float, float | None]]] = []
    for round_index in range(args.rounds + 1):  # the first warms up
        prompts = [
            (2, *(rng.randrange(1000, 200_000) for _ in range(args.prompt_tokens - 1)))
            for _ in range(args.num_requests)
        ]
        measured = {name: run(prompts) for name, run in contenders.items()}
        if round_index:
            rounds.append(measured)
    results = [_summarize(name, rounds) for name in contenders]
    _print_table(results)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, {"settings": settings, "results": [asdict(r) for r in results]})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-transformers", action="store_true", help="measure the engine only")
    parser.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args(argv)


def _contenders(args: argparse.Namespace) -> dict[str, Contender]:
    model = ModelConfig(model=args.model, dtype=args.dtype)
    engine = build_engine(load_gemma(model), EngineConfig(max_num_seqs=max(args.concurrency)))
    contenders: dict[str, Contender] = {}
    if not args.no_transformers:
        gemma = load_gemma(model)  # a second one: the engine has put its attention into the first
        contenders["transformers generate, 1 at a time"] = partial(
            _run_generate, gemma, args.max_tokens
        )
    for concurrency in args.concurrency:
        contenders[f"gemma-serve engine, {concurrency} at a time"] = partial(
            _run_engine, engine, args.max_tokens, concurrency
        )
    return contenders


def _run_engine(
    engine: Engine, max_tokens: int, concurrency: int, prompts: Prompts
) -> tuple[float, float | None]:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    num_tokens, ttfts, begin = 0, [], perf_counter()
    for first in range(0, len(prompts), concurrency):
        started: dict[int, float] = {}
        for key, token_ids in enumerate(prompts[first : first + concurrency]):
            started[key] = perf_counter()
            prompt = PromptInputs(token_ids)
            engine.add(EngineRequest(key=key, prompt=prompt, sampling=sampling))
        while engine.has_work:
            for output in engine.step():
                num_tokens += sum(len(delta.token_ids) for delta in output.deltas)
                if output.key in started:
                    ttfts.append(perf_counter() - started.pop(output.key))
    _check_length(num_tokens, prompts, max_tokens)
    return num_tokens / (perf_counter() - begin), statistics.mean(ttfts)


def _run_generate(
    gemma: LoadedGemma, max_tokens: int, prompts: Prompts
) -> tuple[float, float | None]:
    # Neither the checkpoint's stops nor its sampling.
    gemma.model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens)
    num_tokens, begin = 0, perf_counter()
    for token_ids in prompts:
        input_ids = torch.tensor([token_ids], device=gemma.model.device)
        output = gemma.model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
        num_tokens += output.shape[1] - len(token_ids)
    _check_length(num_tokens, prompts, max_tokens)
    return num_tokens / (perf_counter() - begin), None


def _check_length(num_tokens: int, prompts: Prompts, max_tokens: int) -> None:
    if num_tokens != len(prompts) * max_tokens:
        sys.exit(f"expected {len(prompts) * max_tokens} tokens, got {num_tokens}: not comparable")


def _summarize(name: str, rounds: list[dict[str, tuple[float, float | None]]]) -> Result:
    first = next(iter(rounds[0]))
    ttfts = [ttft for r in rounds if (ttft := r[name][1]) is not None]
    return Result(
        contender=name,
        tokens_per_s=statistics.median(r[name][0] for r in rounds),
        ttft_s=statistics.median(ttfts) if ttfts else None,
        ratio_to_first=statistics.median(r[name][0] / r[first][0] for r in rounds),
    )


def _print_table(results: Sequence[Result]) -> None:
    print(f"{'contender':40} {'tokens/s':>9} {'ratio':>6} {'TTFT s':>7}")
    for r in results:
        ttft = f"{r.ttft_s:7.3f}" if r.ttft_s is not None else "      -"
        print(f"{r.contender:40} {r.tokens_per_s:9.1f} {r.ratio_to_first:6.2f} {ttft}")


if __name__ == "__main__":
    main()
