import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gemma_serve.engine.async_engine import AsyncEngine
from gemma_serve.engine.engine import Engine
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.errors import (
    ConfigurationError,
    GenerationError,
    OverloadedError,
    UnavailableError,
)
from gemma_serve.generation import GenerationStream, SamplingParams
from tests.engine.builders import ScriptedRunner, make_engine, spell
from tests.engine.whole_steps import WholeStepRunner


class GatedRunner(ScriptedRunner):
    """Runs a step only when the test lets it."""

    def __init__(self, script: str) -> None:
        super().__init__(script)
        self._permits = threading.Semaphore(0)

    def allow(self, num_steps: int = 1000) -> None:
        for _ in range(num_steps):
            self._permits.release()

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        assert self._permits.acquire(timeout=10)
        return super().run(batch)


class BrokenRunner(WholeStepRunner):
    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        raise RuntimeError(f"no device for {len(batch.scheduled)} sequences")


@contextmanager
def running(runner: ScriptedRunner, *, max_unfinished_sequences: int = 8) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(
        lambda: make_engine(runner), max_unfinished_sequences=max_unfinished_sequences
    )
    try:
        yield engine
    finally:
        if isinstance(runner, GatedRunner):
            runner.allow()
        engine.close()


def submit(engine: AsyncEngine, *, n: int = 1) -> GenerationStream:
    return engine.submit("req", PromptInputs(spell("hello")), SamplingParams(), n)


async def read(stream: GenerationStream) -> str:
    return "".join(delta.text for deltas in [d async for d in stream] for delta in deltas)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the engine thread sets no event
            await asyncio.sleep(0.001)


def test_what_making_the_engine_raises_is_raised() -> None:
    def fail() -> Engine:
        raise ConfigurationError("no such model")

    with pytest.raises(ConfigurationError, match="no such model"):
        AsyncEngine(fail, max_unfinished_sequences=8)


def test_the_engine_is_made_on_the_thread_that_runs_it() -> None:
    made_on: list[str] = []

    def make() -> Engine:
        made_on.append(threading.current_thread().name)
        return make_engine(ScriptedRunner("Paris"))

    AsyncEngine(make, max_unfinished_sequences=8).close()
    assert made_on == ["gemma-engine"]


async def test_a_request_streams_to_its_end() -> None:
    with running(ScriptedRunner("Paris")) as engine:
        stream = submit(engine)
        assert stream.started.prompt_tokens == 5
        assert await read(stream) == "Paris"


async def test_requests_at_once_do_not_mix() -> None:
    with running(ScriptedRunner("Paris")) as engine:
        texts = await asyncio.gather(*(read(submit(engine)) for _ in range(8)))
    assert texts == ["Paris"] * 8


async def test_a_slow_reader_gets_one_merged_delta_per_sequence() -> None:
    with running(ScriptedRunner("Paris")) as engine:
        stream = submit(engine, n=2)
        await until(lambda: engine.stats.num_running == 0 and not engine._mailboxes)
        items = [deltas async for deltas in stream]
    assert [[(d.index, d.text) for d in deltas] for deltas in items] == [
        [(0, "Paris"), (1, "Paris")]
    ]


async def test_closing_frees_every_block_within_a_step() -> None:
    runner = GatedRunner("a very long answer")
    with running(runner) as engine:
        stream = submit(engine)
        runner.allow(2)
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        runner.allow(1)  # the step that may be under way
        await until(lambda: engine.stats.num_free_blocks == engine.stats.num_blocks)
        assert [d async for d in stream] == []


async def test_a_request_may_be_closed_before_its_first_step() -> None:
    runner = GatedRunner("Paris")
    with running(runner, max_unfinished_sequences=1) as engine:
        await submit(engine).aclose()
        runner.allow()
        assert await read(submit(engine)) == "Paris"


async def test_more_requests_than_allowed_are_refused_until_one_ends() -> None:
    runner = GatedRunner("Paris")
    with running(runner, max_unfinished_sequences=2) as engine:
        first, _second = submit(engine), submit(engine)
        with pytest.raises(OverloadedError, match="2 unfinished answers"):
            submit(engine)
        runner.allow()
        assert await read(first) == "Paris"
        assert await read(submit(engine)) == "Paris"


async def test_the_answers_of_one_request_count_one_by_one() -> None:
    runner = GatedRunner("Paris")
    with running(runner, max_unfinished_sequences=3) as engine:
        submit(engine, n=2)
        with pytest.raises(OverloadedError):
            submit(engine, n=2)
        submit(engine, n=1)


async def test_a_request_of_more_answers_than_are_queued_runs_alone() -> None:
    with running(ScriptedRunner("Hi"), max_unfinished_sequences=3) as engine:
        assert sorted(await read(submit(engine, n=5))) == sorted("Hi" * 5)


async def test_a_request_that_cannot_begin_fails_alone() -> None:
    with running(ScriptedRunner("Paris")) as engine:
        prompt = PromptInputs(spell("hello"))
        bad = engine.submit("bad", prompt, SamplingParams(stop=("",)), 1)
        with pytest.raises(GenerationError):
            await read(bad)
        assert await read(submit(engine)) == "Paris"
        assert engine.stats.num_free_blocks == engine.stats.num_blocks


async def test_an_output_that_comes_after_the_close_is_dropped() -> None:
    """A finished step's outputs may already be on their way when the reader leaves."""
    with running(ScriptedRunner("Paris")) as engine:
        stream = submit(engine)
        while engine.stats.num_running or engine._engine.has_work:
            pass  # without await: what the engine delivers stays in the loop's queue
        await stream.aclose()
        assert [deltas async for deltas in stream] == []


async def test_steps_that_keep_failing_fail_the_health_check() -> None:
    engine = AsyncEngine(lambda: make_engine(BrokenRunner()), max_unfinished_sequences=8)
    engine.check_health()
    for _ in range(3):
        with pytest.raises(GenerationError):
            await read(submit(engine))
    with pytest.raises(UnavailableError, match="3 steps failed"):
        engine.check_health()
    engine.close()


async def test_shutting_down_ends_unfinished_requests_with_an_error() -> None:
    runner = GatedRunner("Paris")
    engine = AsyncEngine(lambda: make_engine(runner), max_unfinished_sequences=8)
    stream = submit(engine)
    await until(lambda: engine.stats.num_running == 1)  # in its first step, which waits
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await until(lambda: not engine._commands.empty())
    runner.allow(1)
    await closing
    with pytest.raises(UnavailableError, match="shutting down"):
        await read(stream)
    with pytest.raises(UnavailableError, match="not running"):
        submit(engine)
