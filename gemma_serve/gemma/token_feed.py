"""Token ids of a step, some of which only the device knows yet."""

import torch
from torch import Tensor

from gemma_serve.engine.scheduler import ScheduledBatch


class TokenFeed:
    """Gives a step those tokens of the step before that the host is still waiting for.

    A step names a token by its id or, if it is awaited, by ``-1 - row``, where ``row`` is the one
    that the step before sampled it from.
    """

    def __init__(self, *, max_rows: int, device: torch.device) -> None:
        """``max_rows``: the most tokens that one step samples. ``device``: of the embedding."""
        self._sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._last: tuple[ScheduledBatch, Tensor] | None = None

    def remember(self, batch: ScheduledBatch, token_ids: Tensor) -> None:
        """``token_ids``: those that the batch sampled, in its order, int64 on any device."""
        self._last = (batch, token_ids)

    def names(self, batch: ScheduledBatch) -> list[int]:
        """Of the batch's tokens, one after the other, for ``token_ids`` to be called next."""
        names: list[int] = []
        rows: dict[int, int] | None = None
        for scheduled in batch.scheduled:
            names += scheduled.token_ids
            if scheduled.is_awaited:
                rows = self._take_last() if rows is None else rows
                names.append(-1 - rows[scheduled.sequence.arrival])
        return names

    def token_ids(self, names: Tensor) -> Tensor:
        """``names``: ``[num_tokens]`` int64 on the feed's device, as are the ids returned.

        Always the same operations on the same memory, so that they can be recorded.
        """
        rows = (-1 - names).clamp(min=0)
        return torch.where(names < 0, self._sampled.index_select(0, rows), names)

    def _take_last(self) -> dict[int, int]:
        """Let ``token_ids`` read the last step's. Returns their rows by arrival."""
        assert self._last is not None
        batch, token_ids = self._last
        self._sampled[: len(token_ids)].copy_(token_ids, non_blocking=True)
        rows, row = {}, 0
        for scheduled in batch.sampling:
            rows[scheduled.sequence.arrival] = row
            row += scheduled.num_sampled
        return rows
