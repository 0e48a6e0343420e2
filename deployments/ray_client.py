"""A ``GenerationClient`` over a Ray Serve handle: errors, cancellation, loading time."""

import asyncio
import logging
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.return_path import ReturnedStream, ReturnSocket
from gemma_serve.errors import (
    GemmaServeError,
    GenerationError,
    OverloadedError,
    UnavailableError,
)
from gemma_serve.generation import (
    GenerationDelta,
    GenerationRequest,
    GenerationStarted,
    GenerationStream,
    ModelDescription,
    ModelLoad,
    Prompt,
    PromptToken,
)

logger = logging.getLogger(__name__)

# A loaded replica answers within milliseconds; a longer wait means that there is none.
HEALTH_TIMEOUT_S = 2.0


class RayGenerationClient:
    """Sends each request to one replica of ``GemmaDeployment``.

    ``admission_timeout_s``: seconds that a request may wait for a replica to take it.
    """

    def __init__(self, gemma: DeploymentHandle[Any], *, admission_timeout_s: float) -> None:
        self._describe = gemma.options(method_name="describe")
        self._check_health = gemma.options(method_name="check_health")
        self._measure_load = gemma.options(method_name="measure_load")
        self._tokenize = gemma.options(method_name="tokenize")
        self._generate = gemma.options(method_name="generate", stream=True)
        self._admission_timeout_s = admission_timeout_s
        self._description: ModelDescription | None = None
        self._return_socket = ReturnSocket()
        # Ray tells the end of a call later than the stream does; until then somebody must hold it.
        self._outcomes: set[asyncio.Future[Any]] = set()

    async def describe(self) -> ModelDescription:
        """Ask a replica once: its successors say the same, as new settings replace this client."""
        if self._description is None:
            self._description = await _ask(self._describe, self._admission_timeout_s)
        return self._description

    async def check_health(self) -> None:
        await _ask(self._check_health, HEALTH_TIMEOUT_S)

    async def measure_load(self) -> ModelLoad:
        load: ModelLoad = await _ask(self._measure_load, HEALTH_TIMEOUT_S)
        return load

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        tokens: tuple[PromptToken, ...] = await _ask(
            self._tokenize, self._admission_timeout_s, prompt
        )
        return tokens

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        returned = await self._return_socket.expect()
        # stream=True makes it a generator, which its type does not tell.
        response = cast(
            DeploymentResponseGenerator[Any], self._generate.remote(request, returned.address)
        )
        outcome = asyncio.create_task(_next_or_none(response))
        self._outcomes.add(outcome)
        outcome.add_done_callback(self._forget)
        items = _ReplicaItems(response, outcome, returned, request.request_id)
        try:
            async with asyncio.timeout(self._admission_timeout_s):
                started: GenerationStarted = await items.first()
        except TimeoutError:
            raise UnavailableError(
                f"No replica of the model took the request within {self._admission_timeout_s:g} s."
            ) from None
        return GenerationStream(started, items, items.aclose)

    def close(self) -> None:
        """Send no more requests; those under way go on."""
        self._return_socket.close()

    def _forget(self, outcome: asyncio.Future[Any]) -> None:
        self._outcomes.discard(outcome)
        if not outcome.cancelled():
            outcome.exception()  # so that asyncio does not complain that nobody has looked


async def _next_or_none(items: DeploymentResponseGenerator[Any]) -> Any:
    """The next item, ``None`` at the end: a task cannot raise ``StopAsyncIteration``."""
    return await anext(items, None)


async def _ask(method: DeploymentHandle[Any], timeout_s: float, *arguments: object) -> Any:
    """What a replica answers. Raises ``UnavailableError`` if none does within ``timeout_s``."""
    response = method.remote(*arguments)
    try:
        with _our_errors(admitted=False):
            async with asyncio.timeout(timeout_s):
                return await response
    except (TimeoutError, asyncio.CancelledError) as error:
        # Unasked, the question would wait on in Serve's queue, one more for each health check.
        response.cancel()  # type: ignore[no-untyped-call]  # ray
        if isinstance(error, TimeoutError):
            raise UnavailableError("The model is still loading.") from None
        raise


class _ReplicaItems:
    """What one replica yields for one request: ``GenerationStarted``, then lists of deltas.

    They come past Ray, or over Ray if the replica is on another machine: the first item settles
    it. Errors always come over Ray.
    """

    def __init__(
        self,
        items: DeploymentResponseGenerator[Any],
        first_over_ray: asyncio.Future[Any],
        returned: ReturnedStream,
        request_id: str,
    ) -> None:
        """``first_over_ray``: the first of ``items``, or ``None`` if they end without any."""
        self._items = items
        self._first_over_ray = first_over_ray
        self._returned = returned
        self._request_id = request_id
        self._over_ray = False
        self._ended = False

    async def first(self) -> GenerationStarted:
        """The replica's admission of the request."""
        started: GenerationStarted = await self._guarded(self._settle(), admitted=False)
        return started

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[GenerationDelta]:
        item = anext(self._items) if self._over_ray else self._receive()
        deltas: list[GenerationDelta] = await self._guarded(item, admitted=True)
        return deltas

    async def aclose(self) -> None:
        """Cancel the replica's work, unless it has ended."""
        self._returned.close()
        if not self._ended:
            self._ended = True
            self._items.cancel()  # type: ignore[no-untyped-call]  # ray
            self._first_over_ray.cancel()

    async def _settle(self) -> Any:
        ways = {self._returned.connection, self._first_over_ray}
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if not self._returned.connection.done():
            started = await self._first_over_ray
            self._over_ray = started is not None  # else it all went past Ray and will be here soon
            if self._over_ray:
                return started
        return await self._receive()

    async def _receive(self) -> Any:
        try:
            return await self._returned.receive()
        except EOFError:
            await self._first_over_ray  # raises what has happened
            raise

    async def _guarded(self, item: Awaitable[Any], *, admitted: bool) -> Any:
        try:
            with _our_errors(admitted=admitted, request_id=self._request_id):
                return await item
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except (StopAsyncIteration, GemmaServeError):
            self._ended = True
            self._returned.close()
            raise


@contextmanager
def _our_errors(*, admitted: bool, request_id: str | None = None) -> Iterator[None]:
    """Raise what Ray raises as one of our errors.

    ``admitted``: whether the request was at work, so that it cannot simply be sent elsewhere.
    """
    try:
        yield
    except asyncio.CancelledError:
        if _is_being_cancelled():
            raise
        # Ray cancelled the replica's task, not somebody this one.
        raise _lost_replica(admitted) from None
    except (StopAsyncIteration, TimeoutError):
        raise
    except Exception as error:
        # The boundary of a request. Over gRPC the replica's own exception comes as it is.
        raise _translated(error, admitted, request_id) from None


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _translated(error: Exception, admitted: bool, request_id: str | None) -> GemmaServeError:
    cause = _cause(error)
    if isinstance(cause, GemmaServeError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(
            "Too many requests are waiting for the model. Please try again in a moment.",
            retry_after_s=cause.retry_after_s or 1.0,
        )
    if isinstance(cause, DeploymentUnavailableError):
        return UnavailableError("The model could not be loaded; the server's log says why.")
    if isinstance(cause, RayActorError | ReplicaUnavailableError | RequestCancelledError):
        return _lost_replica(admitted)
    logger.error("replica failed request_id=%s", request_id, exc_info=error)
    return GenerationError("The model failed while it worked on the request.")


def _cause(error: BaseException) -> BaseException:
    """What was raised in the replica, out of the wrappers of Ray (task) and Serve (gRPC)."""
    if isinstance(error, RayTaskError):
        return _cause(error.cause)
    original = getattr(error, "original_exception", None)
    return _cause(original) if isinstance(original, BaseException) else error


def _lost_replica(admitted: bool) -> GemmaServeError:
    if admitted:
        return GenerationError(
            "The replica that worked on this request has stopped. Please send the request again."
        )
    return UnavailableError("The replica that was to take this request has stopped.")
