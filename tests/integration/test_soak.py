"""A thousand requests of every kind leave nothing behind: no block, no task, no memory.

ollama#10040, #10132, #9791 and #9848 are leaks with images; open-webui#16251 is a stop button that
does not stop.
"""

import asyncio
import base64
import gc
import io
import json
import random
import resource
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from PIL import Image

from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig
from tests.openai_api.harness import Exchange
from tests.tiny import save_tiny_checkpoint

MODEL = "gemma"
NUM_REQUESTS = 1000
NUM_WARM_UP = 200
NUM_TRACED = 150
"""Tracing makes Python several times slower."""
NUM_TRACED_WARM_UP = 50
"""What is only moved, such as a list that grows again, counts as new when tracing begins."""
NUM_CLIENTS = 24
MAX_BYTES_PER_REQUEST = 1000
"""Less than one forgotten task, stream or prompt."""
MAX_RESIDENT_GROWTH_BYTES = 32 * 1024**2
"""The allocator's arenas and torch's scratch space move by less."""

Fields = dict[str, object]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GemmaGenerator]:
    """Few blocks, so that sequences are preempted, and a queue that overflows at times."""
    folder: Path = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vision=True)
    config = EngineConfig(
        max_num_seqs=12,
        max_queued_requests=20,
        prefill_chunk_size=128,
        max_model_len=512,
        block_size=8,
        kv_cache_memory_bytes=300 * 2048,
        # What it keeps is bounded, but counts as growth to a trace that begins late.
        enable_prefix_cache=False,
    )
    generator = GemmaGenerator.load(ModelConfig(model=str(folder), dtype="float32"), config)
    yield generator
    generator.close()


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and the outcomes that it may have."""

    fields: Fields
    outcomes: frozenset[str]
    leave_after: int | None = None
    """Messages of the answer after which the client leaves; 0: before the first."""


def picture(rng: random.Random) -> Fields:
    encoded = io.BytesIO()
    size = rng.choice([(28, 28), (64, 40), (600, 300)])  # the last is cropped too
    Image.new("RGB", size, tuple(rng.choices(range(256), k=3))).save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def user(*contents: object) -> Fields:
    content = contents[0] if len(contents) == 1 else list(contents)
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]}


def text(rng: random.Random, num_characters: int) -> str:
    return "".join(rng.choices("abcdefgh \n", k=num_characters))


FINISHED = frozenset({"stop", "length", "429"})
REFUSED = frozenset({"400"})
LEFT = frozenset({"left", *FINISHED})
INVALID: tuple[Fields, ...] = (
    {"temperature": 9},
    {"n": 0},
    {"messages": []},
    {"messages": [{"role": "user", "content": "x" * 600}]},
    {"logit_bias": {"99999": 1}},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]},
)


def make_case(rng: random.Random) -> Case:
    fields = user(text(rng, rng.randint(1, 30)))
    limit = {"max_tokens": rng.randint(1, 8), "seed": rng.getrandbits(32)}
    kind = rng.choices(range(8), weights=[30, 10, 10, 15, 10, 10, 10, 5])[0]
    match kind:
        case 0:
            return Case({**fields, **limit, "stream": rng.random() < 0.5}, FINISHED)
        case 1:
            long = user(text(rng, rng.randint(150, 300)))
            return Case({**long, **limit, "stream": rng.random() < 0.5}, FINISHED)
        case 2:
            return Case({**fields, **limit, "n": rng.randint(2, 4)}, FINISHED)
        case 3:
            looking = user({"type": "text", "text": "x"}, *(picture(rng) for _ in range(2)))
            return Case({**looking, **limit, "stream": rng.random() < 0.5}, FINISHED)
        case 4:
            stops = {"stop": rng.choices("abcdefgh", k=4), "temperature": 1.5}
            return Case({**fields, **limit, **stops}, FINISHED)
        case 5:
            endless = {"ignore_eos": True, "stream": True}
            return Case({**fields, **endless}, LEFT, leave_after=rng.randint(2, 5))
        case 6:
            n = rng.randint(1, 2)
            endless = {"ignore_eos": True, "stream": rng.random() < 0.5}
            return Case({**fields, **endless, "n": n}, LEFT, leave_after=0)
        case _:
            return Case({**fields, **rng.choice(INVALID)}, REFUSED)


async def outcome_of(app: FastAPI, case: Case) -> str:
    """How the exchange ended: a finish reason, an error's status, or ``left``."""
    exchange = Exchange(app)
    exchange.send_body(**case.fields)
    if case.leave_after is not None:
        await _leave(exchange, case.leave_after)
    await exchange.task
    if not _is_complete(exchange):
        return "left"
    status = exchange.sent[0]["status"]
    body = b"".join(message["body"] for message in exchange.sent[1:])
    return _finish_reason(body) if status == 200 else str(status)


def _is_complete(exchange: Exchange) -> bool:
    last = exchange.sent[-1] if exchange.sent else {"type": ""}
    return last["type"] == "http.response.body" and not last.get("more_body", False)


async def _leave(exchange: Exchange, num_messages: int) -> None:
    if num_messages == 0:
        for _ in range(random.Random(len(exchange.sent)).randint(0, 20)):
            await asyncio.sleep(0)
    else:
        arrived = asyncio.ensure_future(exchange.sent_at_least(num_messages))
        await asyncio.wait({arrived, exchange.task}, return_when=asyncio.FIRST_COMPLETED)
        arrived.cancel()
    exchange.leave()


def _finish_reason(body: bytes) -> str:
    """The one finish reason of every choice, or of the last."""
    if not body.startswith(b"data:"):
        choices = json.loads(body)["choices"]
        assert all(choice["finish_reason"] for choice in choices)
        return str(choices[-1]["finish_reason"])
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert events.pop() == b"[DONE]"
    reasons = [
        choice["finish_reason"] for event in events for choice in json.loads(event)["choices"]
    ]
    finished: list[str] = [reason for reason in reasons if reason]
    return finished[-1]


async def run_all(app: FastAPI, cases: list[Case]) -> Counter[str]:
    """The outcomes of ``cases``, ``NUM_CLIENTS`` of them at once."""
    outcomes: Counter[str] = Counter()
    remaining = iter(cases)

    async def serve_one_after_another() -> None:
        for case in remaining:
            outcome = await outcome_of(app, case)
            assert outcome in case.outcomes, case.fields
            outcomes[outcome] += 1

    async with asyncio.TaskGroup() as clients:
        for _ in range(NUM_CLIENTS):
            clients.create_task(serve_one_after_another())
    return outcomes


async def until_idle(generator: GemmaGenerator) -> None:
    """Until the aborts of the last clients have reached the engine."""
    async with asyncio.timeout(10):
        while generator.stats.num_free_blocks < generator.stats.num_blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def traced_bytes(app: FastAPI, generator: GemmaGenerator, cases: list[Case]) -> int:
    """Bytes of Python's that are held after ``cases`` have been served."""
    await run_all(app, cases)
    await until_idle(generator)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def growth(app: FastAPI, generator: GemmaGenerator, cases: list[Case]) -> int:
    """Bytes of Python's that are held for all but the first of ``cases``."""
    tracemalloc.start()
    try:
        before = await traced_bytes(app, generator, cases[:NUM_TRACED_WARM_UP])
        return await traced_bytes(app, generator, cases[NUM_TRACED_WARM_UP:]) - before
    finally:
        tracemalloc.stop()


async def test_a_thousand_mixed_requests_leave_nothing_behind(generator: GemmaGenerator) -> None:
    app = build_app(generator, ApiConfig(model_name=MODEL))
    rng = random.Random(0)
    cases = [make_case(rng) for _ in range(NUM_REQUESTS)]
    await run_all(app, cases[:NUM_WARM_UP])
    resident_before = resident_bytes()
    outcomes = await run_all(app, cases[NUM_WARM_UP:-NUM_TRACED])
    grown = await growth(app, generator, cases[-NUM_TRACED:])
    # How often the queue is full depends on the machine.
    assert set(outcomes) - {"429"} == {"stop", "length", "left", "400"}
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert (generator.stats.num_running, generator.stats.num_waiting) == (0, 0)
    assert grown < MAX_BYTES_PER_REQUEST * (NUM_TRACED - NUM_TRACED_WARM_UP)
    assert resident_bytes() - resident_before < MAX_RESIDENT_GROWTH_BYTES
