"""A model whose text depends on little, so that it soon repeats itself, and one that guesses it."""

import random
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.model_drafter import ModelDrafter
from gemma_serve.engine.model_runner import ModelRunner, SampledToken
from gemma_serve.engine.sampling.sampler import PendingTokens
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from tests.engine.builders import EOS, spell
from tests.engine.test_sampler import make_sampler
from tests.engine.written_cache import WrittenCache


class HashModel:
    """Logits that depend on a row's last three tokens, the real sampler, and a cache that checks
    what is read from it. Tokens that are awaited it knows from the step that sampled them.

    ``noise``: how far the logits are from those of a ``HashModel`` without. ``nan_share``: of rows
    with a logit that is not a number, where the tokens first chosen are wrong.
    """

    def __init__(
        self,
        blocks: BlockManager,
        windows: Seq[int | None] = (None,),
        *,
        noise: float = 0.0,
        nan_share: float = 0.0,
    ) -> None:
        self.sampler = make_sampler(256, forbidden=[0])
        self.last_sampled: dict[int, int] = {}
        """What the last step chose, by arrival."""
        self._noise = noise
        self._nan_share = nan_share
        self._cache = WrittenCache(
            num_blocks=blocks.num_blocks, block_size=blocks.block_size, windows=windows
        )

    def begin(self, batch: ScheduledBatch) -> "HashStep":
        self._cache.run(batch, self.last_sampled)
        rows = [
            self._logits(self._token_ids(s, num_drafts))
            for s in batch.sampling
            for num_drafts in range(s.num_sampled)
        ]
        return HashStep(self, batch, torch.stack(rows) if rows else torch.empty(0))

    def _token_ids(self, scheduled: ScheduledSequence, num_drafts: int) -> tuple[int, ...]:
        awaited = [self.last_sampled[scheduled.sequence.arrival]] if scheduled.is_awaited else []
        return (*scheduled.sequence.token_ids, *awaited, *scheduled.drafts[:num_drafts])

    def _logits(self, token_ids: tuple[int, ...]) -> Tensor:
        rng = random.Random(repr(token_ids[-3:]))
        letters = torch.tensor([rng.gauss(0, 2) for _ in range(4)])
        noise = torch.tensor([rng.gauss(0, 1) for _ in range(4)])
        logits = torch.full((256,), -20.0)
        logits[list(spell("abc "))] = letters + self._noise * noise
        logits[EOS] = -3.0
        if rng.random() < self._nan_share:
            logits[255] = torch.nan
        return logits


class HashStep:
    def __init__(self, model: HashModel, batch: ScheduledBatch, logits: Tensor) -> None:
        self._model = model
        self._batch = batch
        self._logits = logits
        self._pending: PendingTokens | None = None

    def sample(self) -> None:
        if not self._batch.sampling:
            return
        self._pending = self._model.sampler.start(self._logits, self._batch.sampling_states)
        arrivals = [s.sequence.arrival for s in self._batch.sampling for _ in range(s.num_sampled)]
        sampled = zip(arrivals, self._pending.token_ids.tolist(), strict=True)
        self._model.last_sampled = dict(sampled)

    def tokens(self) -> list[SampledToken]:
        return [] if self._pending is None else self._pending.result()


def make_drafter(
    runner: ModelRunner,
    blocks: BlockManager,
    *,
    vocab_size: int = 256,
    max_model_len: int = 200,
    prefill_chunk_size: int = 16,
) -> ModelDrafter:
    return ModelDrafter(
        runner,
        blocks,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        prefill_chunk_size=prefill_chunk_size,
    )
