"""Attention with torch's fused kernel over gathered keys and values; for any device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gemma_serve.gemma.attention.paged import PagedAttention, sequence_slots
from gemma_serve.gemma.attention.step import Chunk, Segment
from gemma_serve.gemma.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class _DecodeBatch:
    """All chunks of one token, computed together.

    ``rows``: ``[batch]``. ``slots``: ``[batch, max_keys]``. ``bias``: ``[batch, 1, 1, max_keys]``,
    -inf where a shorter sequence is padded, or ``None`` if none is.
    """

    rows: Tensor
    slots: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One segment. ``slots``: ``[num_keys]``. ``bias``: ``[num_tokens, num_keys]`` or ``None``."""

    rows: slice
    slots: Tensor
    bias: Tensor | None
    is_causal: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the layers of one group on one device do in this step."""

    decode: _DecodeBatch | None
    prefills: tuple[_Prefill, ...]


class SdpaAttention(PagedAttention):
    """Decoding sequences in one padded batch, each longer segment by itself.

    Index tensors and masks are made once per step, group and device, and shared by their layers.
    """

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        super().__init__(cache, chunks)
        self._decoding = [c for c in chunks if c.end - c.start == 1 and not c.images]
        self._segments = [
            (c, segment)
            for c in chunks
            if c.end - c.start > 1 or c.images
            for segment in c.segments()
        ]
        self._plans: dict[tuple[int, torch.device], _Plan] = {}
        self._biases: dict[tuple[Segment, int | None, torch.device], Tensor | None] = {}

    def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        plan = self._plan(self._cache.layout.places[layer].group, query.device)
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        if plan.decode is not None:
            output[plan.decode.rows] = self._decode(plan.decode, layer, query, scale)
        for prefill in plan.prefills:
            output[prefill.rows] = self._prefill(prefill, layer, query, scale)
        return output

    def _decode(self, batch: _DecodeBatch, layer: int, query: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.read(layer, batch.slots)  # [batch, max_keys, kv_heads, head_dim]
        num_kv_heads, head_dim = keys.shape[2:]
        # The query heads that share a KV head become rows of one attention: torch's CPU kernel is
        # many times slower with enable_gqa and single rows.
        queries = query[:, batch.rows].transpose(0, 1)  # [batch, num_heads, head_dim]
        output = scaled_dot_product_attention(
            queries.reshape(len(batch.rows), num_kv_heads, -1, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=batch.bias,
            scale=scale,
        )
        return output.reshape(queries.shape)

    def _prefill(self, prefill: _Prefill, layer: int, query: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.read(layer, prefill.slots)  # [num_keys, kv_heads, head_dim]
        group_size = query.shape[0] // keys.shape[1]
        output = scaled_dot_product_attention(
            query[None, :, prefill.rows],
            keys.transpose(0, 1).repeat_interleave(group_size, 0)[None],
            values.transpose(0, 1).repeat_interleave(group_size, 0)[None],
            attn_mask=prefill.bias,
            is_causal=prefill.is_causal,
            scale=scale,
        )
        return output[0].transpose(0, 1)

    def _plan(self, group: int, device: torch.device) -> _Plan:
        plan = self._plans.get((group, device))
        if plan is None:
            plan = self._plans[group, device] = _Plan(
                decode=self._plan_decode(group, device) if self._decoding else None,
                prefills=tuple(
                    self._plan_prefill(chunk, segment, group, device)
                    for chunk, segment in self._segments
                ),
            )
        return plan

    def _plan_decode(self, group: int, device: torch.device) -> _DecodeBatch:
        block_size = self._cache.block_size
        window = self._cache.layout.windows[group]
        first_keys = [0 if window is None else max(0, c.end - window) for c in self._decoding]
        num_keys = [c.end - first for c, first in zip(self._decoding, first_keys, strict=True)]
        blocks = [
            list(chunk.blocks[group][first // block_size : -(-chunk.end // block_size)])
            for chunk, first in zip(self._decoding, first_keys, strict=True)
        ]
        num_blocks = max(map(len, blocks))
        # Padding repeats the last slot: what is read there is masked, but must be finite.
        table = torch.tensor([[*b, *b[-1:] * (num_blocks - len(b))] for b in blocks])
        offsets = torch.tensor(first_keys)[:, None] % block_size
        lengths = torch.tensor(num_keys)[:, None]
        ranks = torch.arange(max(num_keys))
        entries = torch.minimum(ranks, lengths - 1) + offsets  # [batch, max_keys]
        slots = table.gather(1, entries // block_size) * block_size + entries % block_size
        bias = None
        if min(num_keys) < max(num_keys):
            bias = _bias(ranks >= lengths, self._cache.layout.dtype)[:, None, None].to(device)
        rows = torch.tensor([c.row for c in self._decoding])
        return _DecodeBatch(rows.to(device), slots.to(device), bias)

    def _plan_prefill(
        self, chunk: Chunk, segment: Segment, group: int, device: torch.device
    ) -> _Prefill:
        window = self._cache.layout.windows[group]
        slots = sequence_slots(
            chunk.blocks[group], segment.first_key(window), segment.end, self._cache.block_size
        )
        bias = self._segment_bias(segment, window, device)
        is_causal = segment.causal and bias is None
        return _Prefill(segment.rows, slots.to(device), bias, is_causal)

    def _segment_bias(
        self, segment: Segment, window: int | None, device: torch.device
    ) -> Tensor | None:
        key = (segment, window, device)
        if key not in self._biases:
            hidden = _hidden_keys(segment, window)
            bias = None if hidden is None else _bias(hidden, self._cache.layout.dtype).to(device)
            self._biases[key] = bias
        return self._biases[key]


def _hidden_keys(segment: Segment, window: int | None) -> Tensor | None:
    """Which keys each query does not see: ``[num_tokens, num_keys]`` bool.

    ``None`` where no mask is needed: a plain causal triangle, or everything visible.
    """
    first_key = segment.first_key(window)
    window_cuts = window is not None and segment.end - window > first_key
    if not window_cuts and (segment.start == 0 or not segment.causal):
        return None
    queries = torch.arange(segment.start, segment.end)[:, None]
    keys = torch.arange(first_key, segment.end)[None, :]
    hidden = keys > queries if segment.causal else torch.zeros(1, 1, dtype=torch.bool)
    return hidden | (keys <= queries - window) if window is not None else hidden


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where ``hidden``, else 0; torch's CPU kernel is faster with it than with booleans."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
