"""A ``GenerationClient`` that counts and times what passes through it."""

from collections.abc import AsyncIterator, Callable, Sequence
from time import perf_counter

from gemma_serve.generation import (
    GenerationClient,
    GenerationDelta,
    GenerationRequest,
    GenerationStream,
    ModelDescription,
    ModelLoad,
    Prompt,
    PromptToken,
)
from gemma_serve.openai_api.metrics.server_metrics import ServerMetrics


class MeasuredClient:
    """Passes everything on to ``client``."""

    def __init__(
        self,
        client: GenerationClient,
        metrics: ServerMetrics,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """``clock``: seconds."""
        self._client = client
        self._metrics = metrics
        self._clock = clock

    async def describe(self) -> ModelDescription:
        return await self._client.describe()

    async def check_health(self) -> None:
        await self._client.check_health()

    async def measure_load(self) -> ModelLoad:
        return await self._client.measure_load()

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        return await self._client.tokenize(prompt)

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        begun_at = self._clock()
        stream = await self._client.generate(request)
        self._metrics.prompt_tokens.add(stream.started.prompt_tokens)
        deltas = _MeasuredDeltas(stream, self._metrics, self._clock, begun_at, request.n)
        return GenerationStream(stream.started, deltas, stream.aclose)


class _MeasuredDeltas(AsyncIterator[Sequence[GenerationDelta]]):
    """Times the deltas of one request."""

    def __init__(
        self,
        stream: GenerationStream,
        metrics: ServerMetrics,
        clock: Callable[[], float],
        begun_at: float,
        num_unfinished: int,
    ) -> None:
        self._stream = stream
        self._metrics = metrics
        self._clock = clock
        self._begun_at = begun_at
        self._num_unfinished = num_unfinished
        self._last_at: dict[int, float] = {}

    async def __anext__(self) -> Sequence[GenerationDelta]:
        deltas = await anext(self._stream)
        now = self._clock()
        for delta in deltas:
            self._take_in(delta, now)
        return deltas

    def _take_in(self, delta: GenerationDelta, now: float) -> None:
        metrics, num_tokens = self._metrics, len(delta.token_ids)
        metrics.completion_tokens.add(num_tokens)
        last_at = self._last_at.get(delta.index)
        if not self._last_at:
            metrics.time_to_first_token_s.observe(now - self._begun_at)
        if last_at is not None and num_tokens:
            metrics.inter_token_latency_s.observe((now - last_at) / num_tokens, num_tokens)
        self._last_at[delta.index] = now
        if delta.finish_reason is not None:
            metrics.finished_sequences.add(reason=delta.finish_reason)
            self._num_unfinished -= 1
            if self._num_unfinished == 0:
                metrics.request_duration_s.observe(now - self._begun_at)
