"""The engine's border to grammars, and the threads that ask them while the model works."""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol, Self

logger = logging.getLogger(__name__)

_MAX_THREADS: Final = 8
_MAX_WAIT_S: Final = 1.0
"""For a mask after the model's step. One takes about 0.2 ms; a grammar that needs so much more
would stop every other sequence, so its own ends instead."""


class TokenConstraint(Protocol):
    """What may come next in one sequence. Belongs to it, and is used by one thread at a time."""

    def allowed_tokens(self) -> bytes | None:
        """A bit per token id, lowest bit first, set for those that may come next.

        Ids beyond the bits are not allowed. End-of-turn tokens are once the text may end.
        ``None``: the grammar has failed, and nothing may come. Any thread; takes up to milliseconds
        without the interpreter's lock.
        """

    def accept(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``. Takes microseconds."""

    def num_acceptable(self, token_ids: Sequence[int]) -> int:
        """How many of ``token_ids`` could be accepted one after another. Changes nothing."""

    def fork(self) -> Self:
        """A copy that goes its own way. Takes microseconds."""

    @property
    def is_over(self) -> bool:
        """Whether the text is complete, and nothing may follow it."""


@dataclass(frozen=True, slots=True)
class PendingMasks:
    """The masks of one step, by row of its logits. Rows without a constraint have none."""

    constraints: Mapping[int, TokenConstraint]
    futures: Mapping[int, "Future[bytes | None]"]

    def result(self) -> dict[int, bytes | None]:
        """Wait for all; ``None`` for a sequence that cannot go on."""
        wait(self.futures.values(), timeout=_MAX_WAIT_S)
        return {row: self._mask(row, future) for row, future in self.futures.items()}

    def _mask(self, row: int, future: "Future[bytes | None]") -> bytes | None:
        if future.cancel():  # It never started: others hold the threads, and it is not to blame.
            return self.constraints[row].allowed_tokens()
        if not future.done():
            logger.warning("an output constraint needs more than %s s for a token", _MAX_WAIT_S)
            return None
        if (error := future.exception()) is not None:
            logger.error("an output constraint failed", exc_info=error)
            return None
        return future.result()


class MaskThreads:
    """Computes the masks of a step's sequences beside the thread that runs the model."""

    def __init__(self) -> None:
        # Its threads start when the first constraint comes.
        self._pool = ThreadPoolExecutor(
            max_workers=min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="token-masks"
        )

    def start(self, constraints: Sequence[TokenConstraint | None]) -> PendingMasks:
        """Begin with the masks of ``constraints``, one per row; ``None``: the row is free."""
        by_row = {row: c for row, c in enumerate(constraints) if c is not None}
        return PendingMasks(
            by_row, {row: self._pool.submit(c.allowed_tokens) for row, c in by_row.items()}
        )
