"""One step on the device: pack, embed, run transformers' layers, sample."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gemma_serve.engine.sampler import Sampler
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.gemma.attention.paged import ATTENTION_NAME, PagedAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import KVCache
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.prompt_scoring import score_prompts
from gemma_serve.gemma.vision import VisionEncoder

_NO_MASKS = {"full_attention": None, "sliding_attention": None}
"""Given to the model ready-made, so that it makes none."""


class GemmaModelRunner:
    """Runs steps of one loaded model over one cache. Used by the engine thread alone."""

    def __init__(
        self,
        gemma: LoadedGemma,
        cache: KVCache,
        sampler: Sampler,
        attention: type[PagedAttention],
    ) -> None:
        model = gemma.model
        # The vision tower keeps its own attention.
        model.set_attn_implementation(
            {"text_config": ATTENTION_NAME} if gemma.vision else ATTENTION_NAME
        )
        self._text_model = model.get_decoder()
        self._lm_head = model.lm_head
        self._cache = cache
        self._sampler = sampler
        self._attention = attention
        self._vision = (
            VisionEncoder(model, image_mean=gemma.image_mean, image_std=gemma.image_std)
            if gemma.vision
            else None
        )
        self._device = self._text_model.embed_tokens.weight.device

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[int]:
        """As ``engine.model_runner.ModelRunner.run``."""
        hidden_states = self._forward(batch)
        score_prompts(batch, hidden_states, self._lm_head)
        if not batch.sampling:
            return []
        logits = self._lm_head(hidden_states[_sampling_rows(batch)])  # [num_sampling, vocab_size]
        return self._sampler.sample(logits, [s.sequence.sampling_state for s in batch.sampling])

    @torch.inference_mode()
    def logits(self, batch: ScheduledBatch) -> Tensor:
        """The logits of every token of the batch, ``[num_tokens, vocab_size]``; for comparisons."""
        logits: Tensor = self._lm_head(self._forward(batch))
        return logits

    def _forward(self, batch: ScheduledBatch) -> Tensor:
        """Compute keys, values and the last hidden states, ``[num_tokens, hidden_size]``."""
        outputs = self._text_model(
            inputs_embeds=self._embed(batch).unsqueeze(0),
            position_ids=_position_ids(batch).to(self._device).unsqueeze(0),
            attention_mask=_NO_MASKS,
            use_cache=False,
            paged_attention=self._attention(self._cache, _chunks(batch)),
        )
        hidden_states: Tensor = outputs.last_hidden_state[0]
        return hidden_states

    def _embed(self, batch: ScheduledBatch) -> Tensor:
        """Scaled embeddings, and image features as they are: ``[num_tokens, hidden_size]``."""
        token_ids = torch.tensor([i for s in batch.scheduled for i in s.token_ids])
        embed_tokens = self._text_model.embed_tokens
        # Soft tokens may lie beyond the vocabulary; their rows are overwritten below.
        token_ids = torch.where(token_ids < embed_tokens.num_embeddings, token_ids, 0)
        embeddings: Tensor = embed_tokens(token_ids.to(self._device))
        spans = _image_rows(batch)
        if spans and self._vision is not None:
            features = self._vision.encode([view for _, view in spans])
            for (rows, _), of_view in zip(spans, features, strict=True):
                embeddings[rows] = of_view.to(embeddings)
        return embeddings


def _rows(batch: ScheduledBatch) -> Iterator[tuple[int, ScheduledSequence]]:
    """Each scheduled sequence with the row of its first token."""
    row = 0
    for scheduled in batch.scheduled:
        yield row, scheduled
        row += scheduled.end - scheduled.start


def _sampling_rows(batch: ScheduledBatch) -> list[int]:
    return [row + s.end - s.start - 1 for row, s in _rows(batch) if s.samples]


def _position_ids(batch: ScheduledBatch) -> Tensor:
    return torch.cat([torch.arange(s.start, s.end) for s in batch.scheduled])


def _image_rows(batch: ScheduledBatch) -> list[tuple[slice, bytes]]:
    """Where each image's features go, and its view."""
    return [
        (slice(row + image.start - s.start, row + image.end - s.start), image.view)
        for row, s in _rows(batch)
        for image in s.images
    ]


def _chunks(batch: ScheduledBatch) -> list[Chunk]:
    return [
        Chunk(
            row=row,
            start=s.start,
            end=s.end,
            images=tuple((image.start, image.end) for image in s.images),
            blocks=tuple(s.sequence.block_table.groups),
        )
        for row, s in _rows(batch)
    ]
