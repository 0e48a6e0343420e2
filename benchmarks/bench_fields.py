"""What structured output and logprobs cost a running server's streams.

    python -m benchmarks.bench_fields --base-url http://127.0.0.1:8000/v1

The same load with and without such fields, in turn, so that what else the machine does meets all.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import httpx

from benchmarks.bench_serving import Load, run_level
from benchmarks.chat_client import JSONObject, find_model, stream_request
from benchmarks.environment import write_json
from benchmarks.serving_metrics import LevelSummary, summarise

# No text of the tests' lengths comes to its end, so every answer is as long as asked.
_ENDLESS_SCHEMA: Final[JSONObject] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["city", "river", "mountain"]},
            "height": {"type": "integer", "minimum": 0, "maximum": 9000},
        },
        "required": ["name", "kind", "height"],
        "additionalProperties": False,
    },
}
PLAIN: Final = "plain"
FIELDS: Final[Mapping[str, JSONObject]] = {
    PLAIN: {},
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "places", "schema": _ENDLESS_SCHEMA},
        }
    },
    "logprobs": {"logprobs": True},
    "top_logprobs=5": {"logprobs": True, "top_logprobs": 5},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    rounds = asyncio.run(_measure(options))
    rates = {
        name: statistics.median(level.output_tokens_per_s for level in levels)
        for name, levels in rounds.items()
    }
    for name, rate in rates.items():
        print(f"{name:16} {rate:8.1f} tok/s {rate / rates[PLAIN]:8.1%}")
    if options.json:
        settings = {key: getattr(options, key) for key in ("concurrency", "rounds", "max_tokens")}
        write_json(options.json, {"settings": settings, "output_tokens_per_s": rates})
    errors = [error for levels in rounds.values() for level in levels for error in level.errors]
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


async def _measure(options: argparse.Namespace) -> Mapping[str, Sequence[LevelSummary]]:
    rounds: dict[str, list[LevelSummary]] = {name: [] for name in FIELDS}
    async with httpx.AsyncClient(base_url=options.base_url, timeout=600) as client:
        load = Load(
            model=await find_model(client),
            num_requests=options.concurrency,
            prompt_words=20,
            max_tokens=options.max_tokens,
            ignore_eos=True,
            seed=0,
        )
        for fields in FIELDS.values():  # warm up, and compile the schema
            await stream_request(client, load.body(0, 0) | fields)
        for index in range(options.rounds):
            for name, fields in FIELDS.items():
                # New prompts in every round, the same for all of its turns but for the salt.
                turn = replace(load, seed=index, extra=fields | {"cache_salt": name})
                records = await run_level(client, turn, options.concurrency)
                rounds[name].append(summarise(options.concurrency, records))
    return rounds


if __name__ == "__main__":
    sys.exit(main())
