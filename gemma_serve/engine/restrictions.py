"""Which tokens a sequence may say next, where a client has limited them."""

from collections.abc import Collection
from typing import Self

from gemma_serve.generation import SamplingParams


class Restrictions:
    """One sequence's ``min_tokens``, ``allowed_token_ids`` and banned token sequences.

    Owned by the sequence; the sampler only reads it.
    """

    def __init__(
        self,
        *,
        allowed_token_ids: tuple[int, ...] | None,
        banned_sequences: tuple[tuple[int, ...], ...],
        ending_token_ids: Collection[int],
        min_tokens: int,
    ) -> None:
        """``ending_token_ids`` are banned for the first ``min_tokens`` tokens."""
        self.allowed_token_ids = allowed_token_ids
        """All others are banned; ``None``: none is."""
        self._banned_sequences = banned_sequences
        self._ending_token_ids = tuple(ending_token_ids)
        self._num_tokens_before_end = min_tokens
        self._max_tail = max((len(ids) - 1 for ids in banned_sequences), default=0)
        self._tail: tuple[int, ...] = ()

    @classmethod
    def of(cls, sampling: SamplingParams, ending_token_ids: Collection[int]) -> Self | None:
        """``None`` if the client limits nothing."""
        if (
            not sampling.min_tokens
            and sampling.allowed_token_ids is None
            and not sampling.banned_token_sequences
        ):
            return None
        return cls(
            allowed_token_ids=sampling.allowed_token_ids,
            banned_sequences=sampling.banned_token_sequences,
            ending_token_ids=ending_token_ids,
            min_tokens=sampling.min_tokens,
        )

    @property
    def banned_token_ids(self) -> list[int]:
        """What must not come next, besides what ``allowed_token_ids`` leaves out."""
        banned = list(self._ending_token_ids) if self._num_tokens_before_end > 0 else []
        for *before, last in self._banned_sequences:
            if not before or self._tail[-len(before) :] == tuple(before):
                banned.append(last)
        return banned

    def append(self, token_id: int) -> None:
        """``token_id`` is the sequence's next completion token."""
        self._num_tokens_before_end -= 1
        if self._max_tail:
            self._tail = (*self._tail, token_id)[-self._max_tail :]
