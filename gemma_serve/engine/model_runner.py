"""The engine's border to the device."""

from dataclasses import dataclass
from typing import Protocol

from gemma_serve.engine.scheduler import ScheduledBatch


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one sequence."""

    token_id: int | None
    """``None``: there can be none, because what the request asked for rules all of them out."""
    logprobs: tuple[tuple[int, float], ...] = ()
    """``(token_id, logprob)`` of this token, then of the ``SamplingParams.logprobs`` most probable
    ones; empty if not asked for."""


class ModelRunner(Protocol):
    """Computes steps. Used by the engine thread alone."""

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Compute the batch's tokens into the cache; one sampled token per
        ``batch.sampling_states``.

        A ``MemoryError`` fails the batch's newest request; the others are computed again, so it
        must leave nothing behind but keys and values in their slots. Any other exception fails the
        batch's requests, and those only.
        """
