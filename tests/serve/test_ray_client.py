"""What ``RayGenerationClient`` makes of what a handle does; no cluster needed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deployments import ray_client
from deployments.ray_client import RayGenerationClient
from deployments.return_path import ReturnAddress, StreamSender
from gemma_serve.errors import (
    ContextLengthError,
    GemmaServeError,
    GenerationError,
    OverloadedError,
    UnavailableError,
)
from gemma_serve.generation import (
    ChatPrompt,
    GenerationDelta,
    GenerationRequest,
    GenerationStarted,
    ModelDescription,
    ModelLoad,
    Prompt,
    PromptToken,
    SamplingParams,
    TokenPrompt,
)

STARTED = GenerationStarted(prompt_tokens=3)
DELTAS = [GenerationDelta(0, "hi", (1,))]
DESCRIPTION = ModelDescription(
    max_model_len=100, vocab_size=10, default_sampling=SamplingParams(), vision=None
)
REQUEST = GenerationRequest(request_id="r", prompt=ChatPrompt(()), sampling=SamplingParams())
LOAD = ModelLoad(num_running=1, num_waiting=2, cache_usage=0.5)
PROMPT = TokenPrompt((5,))
TOKENS = (PromptToken(5, b"x"),)
FOREVER = object()


@dataclass(frozen=True, slots=True)
class PastRay:
    """What a replica sends past Ray before it goes on with what its script says next."""

    items: tuple[object, ...]
    is_whole: bool = True


class FakeItems:
    """A handle's stream: yields, raises, sends past Ray or waits, as its script says."""

    def __init__(self, script: Sequence[object]) -> None:
        self._script = iter(script)
        self.num_cancels = 0
        self.return_to: ReturnAddress | None = None
        self.is_asked = asyncio.Event()

    async def __anext__(self) -> object:
        self.is_asked.set()
        item = next(self._script, StopAsyncIteration())
        if isinstance(item, PastRay):
            await self._send(item)
            return await anext(self)
        if isinstance(item, asyncio.Event):
            await item.wait()
            return await anext(self)
        if item is FOREVER:
            await asyncio.Event().wait()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.num_cancels += 1

    async def _send(self, sent: PastRay) -> None:
        assert self.return_to is not None
        sender = await StreamSender.connect(self.return_to)
        assert sender is not None
        async with sender:
            for item in sent.items:
                await sender.send(item)
            if sent.is_whole:
                await sender.send_end()


class FakeHandle:
    """A handle to a replica whose streams are ``scripts``, one after another."""

    def __init__(self, *scripts: Sequence[object]) -> None:
        self.is_up = asyncio.Event()
        self.is_up.set()
        self.streams = [FakeItems(script) for script in scripts]
        self._unused = iter(self.streams)
        self.num_describes = 0
        self.replies: list[FakeReply] = []

    def options(self, *, method_name: str, stream: bool = False) -> "FakeMethod":
        assert stream == (method_name == "generate")
        methods: dict[str, Callable[..., Any]] = {
            "generate": self._generate,
            "describe": self._describe,
            "check_health": self._check_health,
            "measure_load": self._measure_load,
            "tokenize": self._tokenize,
        }
        return FakeMethod(methods[method_name])

    def _generate(self, request: GenerationRequest, return_to: ReturnAddress) -> FakeItems:
        assert request is REQUEST
        items = next(self._unused)
        items.return_to = return_to
        return items

    def _describe(self) -> "FakeReply":
        self.num_describes += 1
        return self._reply(DESCRIPTION)

    def _check_health(self) -> "FakeReply":
        return self._reply(None)

    def _measure_load(self) -> "FakeReply":
        return self._reply(LOAD)

    def _tokenize(self, prompt: Prompt) -> "FakeReply":
        assert prompt is PROMPT
        return self._reply(TOKENS)

    def _reply(self, value: object) -> "FakeReply":
        self.replies.append(FakeReply(value, self.is_up))
        return self.replies[-1]


class FakeReply:
    """A handle's response, which comes once ``is_up``."""

    def __init__(self, value: object, is_up: asyncio.Event) -> None:
        self._value = value
        self._is_up = is_up
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, None, object]:
        yield from self._is_up.wait().__await__()
        return self._value

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeMethod:
    """A handle to one method."""

    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


@pytest.fixture(autouse=True)
async def _close_clients() -> AsyncIterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


CLIENTS: list[RayGenerationClient] = []


def client_of(handle: FakeHandle, *, admission_timeout_s: float = 5.0) -> RayGenerationClient:
    gemma = cast(DeploymentHandle[Any], handle)
    CLIENTS.append(RayGenerationClient(gemma, admission_timeout_s=admission_timeout_s))
    return CLIENTS[-1]


def task_error(cause: Exception) -> RayTaskError:
    """``cause`` as it comes out of a handle when a replica has raised it."""
    error = RayTaskError("generate", "", cause)  # type: ignore[no-untyped-call]  # ray
    return cast(RayTaskError, error.as_instanceof_cause())  # type: ignore[no-untyped-call]  # ray


async def error_on_admission(raised: BaseException) -> GemmaServeError:
    with pytest.raises(GemmaServeError) as caught:
        await client_of(FakeHandle([raised])).generate(REQUEST)
    return caught.value


async def error_in_stream(raised: BaseException) -> GemmaServeError:
    stream = await client_of(FakeHandle([STARTED, DELTAS, raised])).generate(REQUEST)
    assert await anext(stream) == DELTAS
    with pytest.raises(GemmaServeError) as caught:
        await anext(stream)
    return caught.value


async def test_first_item_is_what_started_and_the_rest_are_deltas() -> None:
    (items,) = (handle := FakeHandle([STARTED, DELTAS])).streams
    async with await client_of(handle).generate(REQUEST) as stream:
        assert stream.started is STARTED
        assert [deltas async for deltas in stream] == [DELTAS]
    assert items.num_cancels == 0


@pytest.mark.parametrize("after", [[FOREVER], []], ids=["before Ray's end", "after Ray's end"])
async def test_what_comes_past_ray_is_the_same_and_ends_by_itself(after: list[object]) -> None:
    (items,) = (handle := FakeHandle([PastRay((STARTED, DELTAS)), *after])).streams
    async with await client_of(handle).generate(REQUEST) as stream:
        assert stream.started == STARTED
        assert [deltas async for deltas in stream] == [DELTAS]
    assert items.num_cancels == 0


async def test_failure_in_what_comes_past_ray_is_what_ray_says() -> None:
    are_read = asyncio.Event()
    script = [PastRay((STARTED, DELTAS), is_whole=False), are_read, ActorDiedError()]
    stream = await client_of(FakeHandle(script)).generate(REQUEST)
    assert await anext(stream) == DELTAS
    are_read.set()
    with pytest.raises(GenerationError, match="has stopped"):
        await anext(stream)


async def test_closing_cancels_what_comes_past_ray() -> None:
    sent = PastRay((STARTED, DELTAS), is_whole=False)
    (items,) = (handle := FakeHandle([sent, FOREVER])).streams
    stream = await client_of(handle).generate(REQUEST)
    await stream.aclose()
    await stream.aclose()
    assert items.num_cancels == 1


async def test_closing_cancels_the_replicas_work_once() -> None:
    (items,) = (handle := FakeHandle([STARTED, DELTAS])).streams
    stream = await client_of(handle).generate(REQUEST)
    await stream.aclose()
    await stream.aclose()
    assert items.num_cancels == 1


async def test_being_cancelled_before_the_first_item_cancels_the_replicas_work() -> None:
    (items,) = (handle := FakeHandle([FOREVER])).streams
    waiting = asyncio.create_task(client_of(handle).generate(REQUEST))
    await items.is_asked.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert items.num_cancels == 1


async def test_request_that_no_replica_takes_is_given_up() -> None:
    (items,) = (handle := FakeHandle([FOREVER])).streams
    with pytest.raises(UnavailableError, match=r"took the request within 0\.01 s"):
        await client_of(handle, admission_timeout_s=0.01).generate(REQUEST)
    assert items.num_cancels == 1


async def test_our_errors_come_out_of_rays_wrapper_as_they_were() -> None:
    raised = ContextLengthError.of(prompt_tokens=120, max_model_len=100)
    error = await error_on_admission(task_error(raised))
    assert type(error) is ContextLengthError
    assert (error.param, error.code) == ("messages", "context_length_exceeded")


async def test_full_queue_of_serve_is_an_overload() -> None:
    error = await error_on_admission(BackPressureError(5, 5, retry_after_s=3.0))
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 3.0


@pytest.mark.parametrize(
    "lost",
    [ActorDiedError(), asyncio.CancelledError()],
    ids=["killed", "its task was cancelled by Ray"],
)
async def test_lost_replica_can_be_retried_only_before_admission(lost: BaseException) -> None:
    assert isinstance(await error_on_admission(lost), UnavailableError)
    assert isinstance(await error_in_stream(lost), GenerationError)


async def test_unforeseen_failure_hides_its_internals() -> None:
    error = await error_in_stream(task_error(KeyError("secret")))
    assert isinstance(error, GenerationError)
    assert "secret" not in str(error)


async def test_description_is_asked_for_once() -> None:
    handle = FakeHandle([ActorDiedError()])
    client = client_of(handle)
    assert await client.describe() is DESCRIPTION
    with pytest.raises(UnavailableError):
        await client.generate(REQUEST)
    handle.is_up.clear()
    assert await client.describe() is DESCRIPTION
    assert handle.num_describes == 1


async def test_description_waits_for_a_replica_as_long_as_a_request_may() -> None:
    handle = FakeHandle()
    handle.is_up.clear()
    waiting = asyncio.create_task(client_of(handle).describe())
    await asyncio.sleep(0)
    handle.is_up.set()
    assert await waiting is DESCRIPTION


async def test_description_that_no_replica_gives_is_given_up() -> None:
    handle = FakeHandle()
    handle.is_up.clear()
    with pytest.raises(UnavailableError, match="The model is still loading"):
        await client_of(handle, admission_timeout_s=0.01).describe()
    assert handle.replies[0].is_cancelled


async def test_caller_that_leaves_while_the_model_loads_leaves_no_question_behind() -> None:
    handle = FakeHandle()
    handle.is_up.clear()
    waiting = asyncio.create_task(client_of(handle).describe())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert handle.replies[0].is_cancelled


async def test_health_is_asked_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the model was described, ``/health`` said 200 for ever, also when it was gone."""
    monkeypatch.setattr(ray_client, "HEALTH_TIMEOUT_S", 0.01)
    handle = FakeHandle()
    client = client_of(handle)
    await client.describe()
    await client.check_health()
    handle.is_up.clear()
    with pytest.raises(UnavailableError):
        await client.check_health()


async def test_load_and_tokens_are_asked_of_a_replica() -> None:
    client = client_of(FakeHandle())
    assert await client.measure_load() == LOAD
    assert await client.tokenize(PROMPT) == TOKENS
