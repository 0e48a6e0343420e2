"""Load a chat endpoint, ours or any other that speaks OpenAI's protocol, and time its streams.

    python -m benchmarks.bench_serving --concurrency 1 8 --json benchmarks/results/serving.json

Each concurrency level is a closed loop: so many requests are always under way, a new one starts
when one ends. Prompts are random words, different in every request, so that a prefix cache finds
nothing; lengths are fixed by ``temperature: 0`` and ``ignore_eos``.
"""

import argparse
import asyncio
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from benchmarks.chat_client import (
    JSONObject,
    find_model,
    make_prompt,
    read_image_url,
    stream_request,
)
from benchmarks.environment import write_json
from benchmarks.serving_metrics import LevelSummary, RequestRecord, format_table, summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every request of a run asks for."""

    model: str
    num_requests: int
    """Per concurrency level."""
    prompt_words: int
    max_tokens: int
    ignore_eos: bool
    seed: int
    image_url: str | None = None
    extra: JSONObject = field(default_factory=dict)
    """Fields that every request has besides."""

    def body(self, concurrency: int, index: int) -> JSONObject:
        """Return the request number ``index`` of a level: the same for a seed, unlike any other."""
        prompt = make_prompt(f"{self.seed}-{concurrency}-{index}", self.prompt_words)
        content: str | list[JSONObject] = prompt
        if self.image_url is not None:
            image = {"type": "image_url", "image_url": {"url": self.image_url}}
            content = [{"type": "text", "text": prompt}, image]
        body: JSONObject = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | ({"ignore_eos": True} if self.ignore_eos else {}) | self.extra


async def run_level(
    client: httpx.AsyncClient, load: Load, concurrency: int
) -> Sequence[RequestRecord]:
    """Send the level's requests, ``concurrency`` of them at a time."""
    bodies = iter([load.body(concurrency, index) for index in range(load.num_requests)])
    records: list[RequestRecord] = []
    async with asyncio.TaskGroup() as users:
        for _ in range(concurrency):
            users.create_task(_send_all(client, bodies, records))
    return records


async def _send_all(
    client: httpx.AsyncClient, bodies: Iterator[JSONObject], records: list[RequestRecord]
) -> None:
    for body in bodies:
        records.append(await stream_request(client, body))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_serving", description="Time the streams of an OpenAI chat endpoint."
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="up to /v1")
    parser.add_argument("--model", help="default: the first that the endpoint lists")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY"
    )
    parser.add_argument("--concurrency", type=_positive, nargs="+", default=[1, 8])
    parser.add_argument("--num-requests", type=_positive, default=32, help="per level")
    parser.add_argument("--num-warmup", type=int, default=1, help="unmeasured requests before all")
    parser.add_argument("--prompt-words", type=_positive, default=100)
    parser.add_argument("--max-tokens", type=_positive, default=128, help="of every answer")
    parser.add_argument("--image", type=Path, help="sent with every prompt, always the same")
    parser.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on past the model's end; for endpoints that refuse the field, say no",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(2**31),
        help="of the prompts; default: new ones, which no cache has seen in an earlier run",
    )
    parser.add_argument("--timeout-s", type=float, default=600, help="between two chunks")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here too")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def make_client(options: argparse.Namespace) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return httpx.AsyncClient(
        base_url=options.base_url,
        headers=headers,
        timeout=options.timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def measure(
    options: argparse.Namespace, image_url: str | None
) -> tuple[Load, list[LevelSummary]]:
    """Run all levels, one after another."""
    async with make_client(options) as client:
        load = Load(
            model=options.model or await find_model(client),
            num_requests=options.num_requests,
            prompt_words=options.prompt_words,
            max_tokens=options.max_tokens,
            ignore_eos=options.ignore_eos,
            seed=options.seed,
            image_url=image_url,
        )
        for index in range(options.num_warmup):
            await stream_request(client, load.body(0, index))  # no level has concurrency 0
        levels = []
        for concurrency in options.concurrency:
            levels.append(summarise(concurrency, await run_level(client, load, concurrency)))
            print(f"concurrency {concurrency}: {levels[-1].duration_s:.1f} s", file=sys.stderr)
        return load, levels


def report(options: argparse.Namespace, load: Load, levels: Sequence[LevelSummary]) -> JSONObject:
    settings = asdict(load) | {"base_url": options.base_url, "image": str(options.image or "")}
    del settings["image_url"]  # megabytes of base64
    return {"settings": settings, "levels": [asdict(level) for level in levels]}


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    image_url = read_image_url(options.image) if options.image else None
    try:
        load, levels = asyncio.run(measure(options, image_url))
    except httpx.HTTPError as failure:  # requests record theirs; this is the list of models
        print(f"cannot use {options.base_url}: {failure}", file=sys.stderr)
        return 1
    print(
        f"{load.model} at {options.base_url}: {load.prompt_words} words in, "
        f"{load.max_tokens} tokens out, seed {load.seed}; latencies in ms\n\n{format_table(levels)}"
    )
    for level in levels:
        for error, count in level.errors.items():
            print(f"concurrency {level.concurrency}: {count} x {error}", file=sys.stderr)
    if options.json:
        write_json(options.json, report(options, load, levels))
    return 1 if any(level.num_errors for level in levels) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
