"""A model whose text depends on little, so that it soon repeats itself, and one that guesses it."""

import random
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.model_drafter import ModelDrafter
from gemma_serve.engine.model_runner import ModelRunner, SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch
from tests.engine.builders import EOS, spell
from tests.engine.test_sampler import make_sampler
from tests.engine.written_cache import WrittenCache


class HashModel:
    """Logits that depend on a row's last three tokens, the real sampler, and a cache that checks
    what is read from it.

    ``noise``: how far the logits are from those of a ``HashModel`` without.
    """

    def __init__(
        self, blocks: BlockManager, windows: Seq[int | None] = (None,), *, noise: float = 0.0
    ) -> None:
        self._sampler = make_sampler(256, forbidden=[0])
        self._noise = noise
        self._cache = WrittenCache(
            num_blocks=blocks.num_blocks, block_size=blocks.block_size, windows=windows
        )

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        self._cache.run(batch)
        rows = [
            self._logits((*s.sequence.token_ids, *s.drafts[:num_drafts]))
            for s in batch.sampling
            for num_drafts in range(s.num_sampled)
        ]
        return self._sampler.sample(torch.stack(rows), batch.sampling_states) if rows else []

    def _logits(self, token_ids: tuple[int, ...]) -> Tensor:
        rng = random.Random(repr(token_ids[-3:]))
        letters = torch.tensor([rng.gauss(0, 2) for _ in range(4)])
        noise = torch.tensor([rng.gauss(0, 1) for _ in range(4)])
        logits = torch.full((256,), -20.0)
        logits[list(spell("abc "))] = letters + self._noise * noise
        logits[EOS] = -3.0
        return logits


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
