"""The engine's border to the device."""

from typing import Protocol

from gemma_serve.engine.scheduler import ScheduledBatch


class ModelRunner(Protocol):
    """Computes steps. Used by the engine thread alone."""

    def run(self, batch: ScheduledBatch) -> list[int]:
        """Compute the batch's tokens into the cache; one sampled id per ``batch.sampling``.

        A ``MemoryError`` fails the batch's newest request; the others are computed again, so it
        must leave nothing behind but keys and values in their slots. Any other exception fails the
        batch's requests, and those only.
        """
