"""Deltas of one request on their way from the engine to its reader."""

import asyncio
import logging
from collections.abc import Iterable
from time import perf_counter
from typing import Self

from gemma_serve.errors import GemmaServeError
from gemma_serve.generation import FinishReason, GenerationDelta

logger = logging.getLogger(__name__)


class Mailbox:
    """An async iterator of lists of deltas, filled and read on the event loop that made it.

    Deltas that the reader has not taken are merged per sequence, so a slow reader gets fewer and
    larger items, and the memory held is that of the text.
    """

    def __init__(self, request_id: str, num_sequences: int) -> None:
        self.loop = asyncio.get_running_loop()
        self._request_id = request_id
        self.num_unfinished = num_sequences
        """Sequences whose end has not been put."""
        self._pending: dict[int, GenerationDelta] = {}
        self._error: GemmaServeError | None = None
        self._filled = asyncio.Event()
        self._finish_reasons: list[FinishReason] = []
        self._num_completion_tokens = 0
        self._num_cached_tokens = 0
        self._created_at = perf_counter()
        self._first_token_at: float | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing more will be put."""
        return self.num_unfinished == 0 or self._error is not None

    def put(self, deltas: Iterable[GenerationDelta], error: GemmaServeError | None) -> None:
        """Add what a step brought; ``error`` ends the request after everything put so far."""
        for delta in deltas:
            earlier = self._pending.get(delta.index)
            self._pending[delta.index] = delta if earlier is None else earlier + delta
            self._num_completion_tokens += len(delta.token_ids)
            if delta.index == 0:
                self._num_cached_tokens += delta.cached_tokens
            self._first_token_at = self._first_token_at or perf_counter()
            if delta.finish_reason is not None:
                self._finish_reasons.append(delta.finish_reason)
                self.num_unfinished -= 1
        self._error = error
        self._filled.set()
        if self.complete:
            self._log("failed" if error else "finished")

    def close(self) -> None:
        """The reader leaves early; a read under way ends as if all had come."""
        self.num_unfinished = 0
        self._filled.set()
        self._log("aborted")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[GenerationDelta]:
        """Raises the error that ended the request, if one did."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self.num_unfinished == 0:
                raise StopAsyncIteration
            self._filled.clear()
            await self._filled.wait()
        deltas = list(self._pending.values())
        self._pending.clear()
        return deltas

    def _log(self, event: str) -> None:
        now = perf_counter()
        logger.info(
            "%s request_id=%s reason=%s cached_tokens=%d completion_tokens=%d ttft_s=%.3f "
            "duration_s=%.3f",
            event,
            self._request_id,
            ",".join(self._finish_reasons) or None,
            self._num_cached_tokens,
            self._num_completion_tokens,
            (self._first_token_at or now) - self._created_at,
            now - self._created_at,
        )
