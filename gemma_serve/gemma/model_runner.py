"""One step on the device: pack, embed, run the layers, sample."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.sampler import Sampler
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.engine.sequence import ImageSpan
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.sdpa import SDPA_KERNELS
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.decode_steps import DecodeSteps
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.kv_cache import KVCache
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.out_of_memory import memory_errors
from gemma_serve.gemma.prompt_scoring import score_prompts
from gemma_serve.gemma.vision import VisionEncoder


class GemmaModelRunner:
    """Runs steps of one loaded model over one cache. Used by the engine thread alone."""

    def __init__(
        self,
        gemma: LoadedGemma,
        decoder: Decoder,
        cache: KVCache,
        sampler: Sampler,
        attention: AttentionFactory,
        *,
        vision_cache_bytes: int = 0,
        decode_steps: DecodeSteps | None = None,
    ) -> None:
        """``decode_steps``: over the same ``decoder`` and ``cache``; they take the steps that they
        can once they are recorded."""
        model = gemma.model
        self._embed_tokens = model.get_decoder().embed_tokens
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler
        self._attention = attention
        self._decode_steps = decode_steps
        self._vision = (
            VisionEncoder(
                model,
                image_mean=gemma.image_mean,
                image_std=gemma.image_std,
                cache_bytes=vision_cache_bytes,
            )
            if gemma.vision
            else None
        )
        self._device = self._embed_tokens.weight.device

    def record_decode_steps(self) -> None:
        """Have decode steps recorded, if any can be; takes seconds, and memory that stays."""
        if self._decode_steps is not None:
            self._decode_steps.record()

    @memory_errors()
    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """As ``engine.model_runner.ModelRunner.run``."""
        states = batch.sampling_states
        masks = self._sampler.start_masks(states)
        hidden_states = self._forward(batch)
        score_prompts(batch, hidden_states, self._decoder)
        if not batch.sampling:
            return []
        logits = self._decoder.logits(_sampling(batch, hidden_states))  # [num_rows, vocab_size]
        return self._sampler.sample(logits, states, masks)

    @torch.inference_mode()
    def logits(self, batch: ScheduledBatch) -> Tensor:
        """The logits of every token of the batch, ``[num_tokens, vocab_size]``; for comparisons."""
        return self._decoder.logits(self._forward(batch))

    @sdpa_kernel([*SDPA_KERNELS])
    def _forward(self, batch: ScheduledBatch) -> Tensor:
        """Compute keys and values. Returns what ``Decoder.forward`` does, good until the next."""
        chunks = chunks_of(batch)
        if self._decode_steps is not None and self._decode_steps.takes(chunks):
            token_ids = [i for s in batch.scheduled for i in s.token_ids]
            return self._decode_steps.run(token_ids, chunks)
        return self._decoder.forward(
            self._embed(batch),
            _positions(batch).to(self._device, non_blocking=True),
            self._attention(self._cache, chunks),
        )

    def _embed(self, batch: ScheduledBatch) -> Tensor:
        """Scaled embeddings, and image features as they are: ``[num_tokens, hidden_size]``."""
        token_ids = torch.tensor([i for s in batch.scheduled for i in s.token_ids])
        embed_tokens = self._embed_tokens
        # Soft tokens may lie beyond the vocabulary; their rows are overwritten below.
        token_ids = torch.where(token_ids < embed_tokens.num_embeddings, token_ids, 0)
        embeddings: Tensor = embed_tokens(token_ids.to(self._device, non_blocking=True))
        spans = _image_rows(batch)
        if spans and self._vision is not None:
            features = self._vision.encode([image for _, image in spans])
            for (rows, _), of_view in zip(spans, features, strict=True):
                embeddings[rows] = of_view.to(embeddings)
        return embeddings


def _rows(batch: ScheduledBatch) -> Iterator[tuple[int, ScheduledSequence]]:
    """Each scheduled sequence with the row of its first token."""
    row = 0
    for scheduled in batch.scheduled:
        yield row, scheduled
        row += scheduled.end - scheduled.start


def _sampling(batch: ScheduledBatch, hidden_states: Tensor) -> Tensor:
    """The rows of the tokens from which sequences sample."""
    rows = [
        sampling_row
        for row, s in _rows(batch)
        for sampling_row in range(row + s.end - s.start - s.num_sampled, row + s.end - s.start)
    ]
    if len(rows) == len(hidden_states):
        return hidden_states
    # A list as index would be copied to the device only after all of the step has run there.
    return hidden_states[torch.tensor(rows).to(hidden_states.device, non_blocking=True)]


def _positions(batch: ScheduledBatch) -> Tensor:
    return torch.tensor([p for s in batch.scheduled for p in range(s.start, s.end)])


def _image_rows(batch: ScheduledBatch) -> list[tuple[slice, ImageSpan]]:
    """Where each image's features go."""
    return [
        (slice(row + image.start - s.start, row + image.end - s.start), image)
        for row, s in _rows(batch)
        for image in s.images
    ]


def chunks_of(batch: ScheduledBatch) -> list[Chunk]:
    """What attention must know of the step."""
    return [
        Chunk(
            row=row,
            start=s.start,
            end=s.end,
            images=tuple((image.start, image.end) for image in s.images),
            blocks=tuple(s.sequence.block_table.groups),
            blocks_id=(s.sequence.arrival, s.sequence.block_table.num_freed),
        )
        for row, s in _rows(batch)
    ]
