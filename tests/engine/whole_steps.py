"""For runners that compute a whole step at once, when it is sampled."""

from abc import ABC, abstractmethod

from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch


class WholeStepRunner(ABC):
    """A ``ModelRunner`` by its ``run``, for which every token is known."""

    @abstractmethod
    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Compute a step: ``num_sampled`` tokens for each sequence that samples."""

    def begin(self, batch: ScheduledBatch) -> "WholeStep":
        return WholeStep(self, batch)


class WholeStep:
    def __init__(self, runner: WholeStepRunner, batch: ScheduledBatch) -> None:
        self._runner = runner
        self._batch = batch
        self._tokens: list[SampledToken] = []

    def sample(self) -> None:
        self._tokens = self._runner.run(self._batch)

    def tokens(self) -> list[SampledToken]:
        return self._tokens
