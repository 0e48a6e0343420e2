"""Steps on the device: pack, embed, run the layers, sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from gemma_serve.engine.constraint import PendingMasks
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.sampling.sampler import PendingTokens, Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.engine.sequence import ImageSpan
from gemma_serve.engine.transfers import upload
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.sdpa import SDPA_KERNELS
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.decode_steps import DecodeSteps
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.kv_cache import KVCache
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.out_of_memory import memory_errors
from gemma_serve.gemma.prompt_scoring import score_prompts
from gemma_serve.gemma.token_feed import TokenFeed
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
        token_feed: TokenFeed,
        *,
        vision_cache_bytes: int = 0,
        decode_steps: DecodeSteps | None = None,
    ) -> None:
        """``decode_steps``: over the same ``decoder``, ``cache`` and ``token_feed``; they take the
        steps that they can once they are recorded."""
        model = gemma.model
        self._embed_tokens = model.get_decoder().embed_tokens
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler
        self._attention = attention
        self._token_feed = token_feed
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
    def begin(self, batch: ScheduledBatch) -> "GemmaStep":
        """As ``engine.model_runner.ModelRunner.begin``."""
        rows: _Rows | None = None
        if not any(scheduled.is_awaited for scheduled in batch.sampling):
            rows = _Rows.of(batch, self._sampler)  # while the model computes
        return GemmaStep(
            batch, self._forward(batch), rows, self._decoder, self._sampler, self._token_feed
        )

    @torch.inference_mode()
    def logits(self, batch: ScheduledBatch) -> Tensor:
        """The logits of every token of the batch, ``[num_tokens, vocab_size]``; for comparisons."""
        return self._decoder.logits(self._forward(batch))

    @sdpa_kernel([*SDPA_KERNELS])
    def _forward(self, batch: ScheduledBatch) -> Tensor:
        """Compute keys and values. Returns what ``Decoder.forward`` does, good until the next."""
        chunks = chunks_of(batch)
        if self._decode_steps is not None and self._decode_steps.takes(chunks):
            return self._decode_steps.run(self._token_feed.names(batch), chunks)
        return self._decoder.forward(
            self._embed(batch),
            upload(_positions(batch), self._device),
            self._attention(self._cache, chunks),
        )

    def _embed(self, batch: ScheduledBatch) -> Tensor:
        """Scaled embeddings, and image features as they are: ``[num_tokens, hidden_size]``."""
        names = torch.tensor(self._token_feed.names(batch))
        embed_tokens = self._embed_tokens
        # Soft tokens may lie beyond the vocabulary; their rows are overwritten below.
        names = torch.where(names < embed_tokens.num_embeddings, names, 0)
        names = upload(names, self._device)
        embeddings: Tensor = embed_tokens(self._token_feed.token_ids(names))
        spans = _image_rows(batch)
        if spans and self._vision is not None:
            features = self._vision.encode([image for _, image in spans])
            for (rows, _), of_view in zip(spans, features, strict=True):
                embeddings[rows] = of_view.to(embeddings)
        return embeddings


@dataclass(frozen=True, slots=True)
class _Rows:
    """How each row of a step's logits is sampled, and the tokens that it may choose from."""

    states: list[SamplingState]
    masks: PendingMasks

    @classmethod
    def of(cls, batch: ScheduledBatch, sampler: Sampler) -> Self:
        states = batch.sampling_states
        return cls(states, sampler.start_masks(states))


class GemmaStep:
    """One whose keys, values and hidden states are being computed."""

    def __init__(
        self,
        batch: ScheduledBatch,
        hidden_states: Tensor,
        rows: _Rows | None,
        decoder: Decoder,
        sampler: Sampler,
        token_feed: TokenFeed,
    ) -> None:
        """``rows``: if they are known, since no token is awaited."""
        self._batch = batch
        self._hidden_states = hidden_states
        self._rows = rows
        self._decoder = decoder
        self._sampler = sampler
        self._token_feed = token_feed
        self._pending: PendingTokens | None = None

    @memory_errors()
    @torch.inference_mode()
    def sample(self) -> None:
        """As ``engine.model_runner.StepUnderWay.sample``."""
        batch, hidden_states = self._batch, self._hidden_states
        score_prompts(batch, hidden_states, self._decoder)
        if not batch.sampling:
            return
        rows = self._rows or _Rows.of(batch, self._sampler)
        logits = self._decoder.logits(_sampling(batch, hidden_states))  # [num_rows, vocab_size]
        self._pending = self._sampler.start(logits, rows.states, rows.masks)
        self._token_feed.remember(batch, self._pending.token_ids)

    @memory_errors()
    def tokens(self) -> list[SampledToken]:
        """As ``engine.model_runner.StepUnderWay.tokens``."""
        return [] if self._pending is None else self._pending.result()


def _first_rows(batch: ScheduledBatch) -> Iterator[tuple[int, ScheduledSequence]]:
    """Each scheduled sequence with the row of its first token."""
    row = 0
    for scheduled in batch.scheduled:
        yield row, scheduled
        row += scheduled.end - scheduled.start


def _sampling(batch: ScheduledBatch, hidden_states: Tensor) -> Tensor:
    """The rows of the tokens from which sequences sample."""
    rows = [
        sampling_row
        for row, s in _first_rows(batch)
        for sampling_row in range(row + s.end - s.start - s.num_sampled, row + s.end - s.start)
    ]
    if len(rows) == len(hidden_states):
        return hidden_states
    # A list as index would be copied to the device only after all of the step has run there.
    return hidden_states[upload(torch.tensor(rows), hidden_states.device)]


def _positions(batch: ScheduledBatch) -> Tensor:
    return torch.tensor([p for s in batch.scheduled for p in range(s.start, s.end)])


def _image_rows(batch: ScheduledBatch) -> list[tuple[slice, ImageSpan]]:
    """Where each image's features go."""
    return [
        (slice(row + image.start - s.start, row + image.end - s.start), image)
        for row, s in _first_rows(batch)
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
        for row, s in _first_rows(batch)
    ]
