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
    is_revised: bool = False
    """Whether a step that computed this token before it was known has computed another."""


class StepUnderWay(Protocol):
    """A step that the device works on."""

    def sample(self) -> None:
        """Let the next tokens be chosen, by what the sequences are now.

        Once, and before another step is begun.
        """

    def tokens(self) -> list[SampledToken]:
        """Wait for them: ``num_sampled`` for each sequence of the batch that samples."""


class ModelRunner(Protocol):
    """Computes steps, one after the other. Used by the engine thread alone.

    A ``MemoryError`` fails the batch's newest request; the others are computed again, so it must
    leave nothing behind but keys and values in their slots. Any other exception fails the batch's
    requests, and those only.
    """

    def begin(self, batch: ScheduledBatch) -> StepUnderWay:
        """Let the batch's tokens be computed into the cache.

        Those that are awaited are what the step before, which has been sampled, will give.
        """


def run_step(runner: ModelRunner, batch: ScheduledBatch) -> list[SampledToken]:
    """All of a step. Returns what ``StepUnderWay.tokens`` does."""
    step = runner.begin(batch)
    step.sample()
    return step.tokens()
