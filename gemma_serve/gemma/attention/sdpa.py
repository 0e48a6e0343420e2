"""Attention with torch's fused kernel over gathered keys and values; for any device.

The query heads that share a KV head become rows of one attention. torch's kernels take grouped
heads too, but the CPU's is many times slower with single rows, and those of CUDA that take a mask
want the keys repeated per head, which for a long chat is gigabytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from gemma_serve.engine.transfers import upload
from gemma_serve.gemma.attention.paged import PagedAttention, sequence_slots
from gemma_serve.gemma.attention.step import Chunk, Segment
from gemma_serve.gemma.kv_cache import KVCache

_MAX_PADDING = 2
"""A decoding sequence reads at most so many times its own keys."""

_FREE_PADDED_KEYS = 256
"""Below this length padding costs less than another kernel call."""

MAX_GATHERED_KEYS = 32_768
"""Keys that one decode batch reads, unless a single sequence has more: 256 MiB of a 27B layer."""

SDPA_KERNELS: Final = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""All but cuDNN's, which torch prefers on Hopper and Blackwell. It takes tens of milliseconds to
prepare for each new number of keys, and a chat has a new one at every token (pytorch#155958)."""


@dataclass(frozen=True, slots=True)
class _DecodeBatch:
    """Chunks of one token, computed together.

    ``rows``: ``[batch]``, or a slice if they stand together. ``slots``: ``[batch, max_keys]``.
    ``bias``: ``[batch, 1, 1, max_keys]``, -inf where a shorter sequence is padded, or
    ``None`` if none is.
    """

    rows: Tensor | slice
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

    decodes: tuple[_DecodeBatch, ...]
    prefills: tuple[_Prefill, ...]


class SdpaAttention(PagedAttention):
    """Decoding sequences of similar length in padded batches, each longer segment by itself.

    Index tensors and masks are made once per step, group and device, and shared by their layers.
    They are copied without waiting, which would let a GPU run dry in the middle of the step.
    """

    reads_fp8 = True

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
        output = torch.empty_like(query)
        self._attend_into(output, layer, query, scale)
        return output

    def _attend_into(self, output: Tensor, layer: int, query: Tensor, scale: float) -> None:
        """Fill the rows of the chunks."""
        plan = self._plan(self._cache.layout.places[layer].group, query)
        for decode in plan.decodes:
            output[decode.rows] = self._decode(decode, layer, query, scale)
        for prefill in plan.prefills:
            output[prefill.rows] = self._prefill(prefill, layer, query, scale)

    def _decode(self, batch: _DecodeBatch, layer: int, query: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.read(layer, batch.slots, query.dtype)
        num_kv_heads, head_dim = keys.shape[2:]  # [batch, max_keys, num_kv_heads, head_dim]
        queries = query[batch.rows]  # [batch, num_heads, head_dim]
        output = scaled_dot_product_attention(
            queries.reshape(len(queries), num_kv_heads, -1, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=batch.bias,
            scale=scale,
        )
        return output.reshape(queries.shape)

    def _prefill(self, prefill: _Prefill, layer: int, query: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.read(layer, prefill.slots, query.dtype)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        queries = query[prefill.rows].transpose(0, 1)[None]  # [1, num_heads, num_tokens, head_dim]
        num_heads, num_tokens, head_dim = queries.shape[1:]
        group_size = num_heads // keys.shape[1]
        if prefill.is_causal:
            # A triangle without a mask, which rows of several heads could not share. It begins
            # with the sequence, so that no more keys than one chunk has are repeated.
            keys = keys.repeat_interleave(group_size, 1)
            values = values.repeat_interleave(group_size, 1)
        else:
            queries = queries.reshape(1, keys.shape[1], group_size * num_tokens, head_dim)
        bias = None if prefill.bias is None else prefill.bias.repeat(group_size, 1)
        output = scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, is_causal=prefill.is_causal, scale=scale
        )
        return output.reshape(num_heads, num_tokens, head_dim).transpose(0, 1)

    def _plan(self, group: int, query: Tensor) -> _Plan:
        if (group, query.device) not in self._plans:
            self._make_plans(self._cache.layout.windows[group], query)
        return self._plans[group, query.device]

    def _make_plans(self, window: int | None, query: Tensor) -> None:
        """For all groups with one window: they read the same positions from other blocks.

        ``query``: for device and dtype of what is planned.
        """
        groups = [g for g, w in enumerate(self._cache.layout.windows) if w == window]
        decodes = [
            self._plan_decode(batch, groups, window, query)
            for batch in self._decode_batches(window)
        ]
        for rank, group in enumerate(groups):
            self._plans[group, query.device] = _Plan(
                decodes=tuple(of_groups[rank] for of_groups in decodes),
                prefills=tuple(
                    self._plan_prefill(chunk, segment, group, query)
                    for chunk, segment in self._segments
                ),
            )

    def _decode_batches(self, window: int | None) -> Iterator[list[Chunk]]:
        """Deal the decoding sequences into batches of similar numbers of keys."""
        batch: list[Chunk] = []
        for chunk in sorted(self._decoding, key=lambda c: _num_keys(c, window)):
            num_keys = _num_keys(chunk, window)
            if batch and (
                num_keys > max(_FREE_PADDED_KEYS, _MAX_PADDING * _num_keys(batch[0], window))
                or num_keys * (len(batch) + 1) > MAX_GATHERED_KEYS
            ):
                yield batch
                batch = []
            batch.append(chunk)
        if batch:
            # Usually all are in one batch, and then their rows stand together.
            yield sorted(batch, key=lambda c: c.row)

    def _plan_decode(
        self,
        batch: Sequence[Chunk],
        groups: Sequence[int],
        window: int | None,
        query: Tensor,
    ) -> list[_DecodeBatch]:
        """One for each of ``groups``."""
        block_size = self._cache.block_size
        num_keys = [_num_keys(chunk, window) for chunk in batch]
        first_keys = [c.end - num for c, num in zip(batch, num_keys, strict=True)]
        used = [
            slice(first // block_size, -(-chunk.end // block_size))
            for chunk, first in zip(batch, first_keys, strict=True)
        ]
        num_blocks = max(blocks.stop - blocks.start for blocks in used)
        tables = torch.tensor(
            [
                [_padded(c.blocks[g][u], num_blocks) for c, u in zip(batch, used, strict=True)]
                for g in groups
            ]
        )  # [num_groups, batch, num_blocks]
        offsets = torch.tensor(first_keys)[:, None] % block_size
        lengths = torch.tensor(num_keys)[:, None]
        ranks = torch.arange(max(num_keys))
        entries = torch.minimum(ranks, lengths - 1) + offsets  # [batch, max_keys]
        blocks = tables.gather(2, (entries // block_size).expand(len(groups), -1, -1))
        slots = upload(blocks * block_size + entries % block_size, query.device)
        bias = None
        if min(num_keys) < max(num_keys):
            bias = _bias(ranks >= lengths, query)[:, None, None]
        rows = _rows(batch, query.device)
        return [_DecodeBatch(rows, of_group, bias) for of_group in slots.unbind()]

    def _plan_prefill(self, chunk: Chunk, segment: Segment, group: int, query: Tensor) -> _Prefill:
        window = self._cache.layout.windows[group]
        slots = sequence_slots(
            chunk.blocks[group], segment.first_key(window), segment.end, self._cache.block_size
        )
        bias = self._segment_bias(segment, window, query)
        is_causal = segment.causal and bias is None
        return _Prefill(segment.rows, upload(slots, query.device), bias, is_causal)

    def _segment_bias(self, segment: Segment, window: int | None, query: Tensor) -> Tensor | None:
        key = (segment, window, query.device)
        if key not in self._biases:
            hidden = _hidden_keys(segment, window)
            self._biases[key] = None if hidden is None else _bias(hidden, query)
        return self._biases[key]


def _num_keys(chunk: Chunk, window: int | None) -> int:
    """Keys that a chunk of one token sees."""
    return chunk.end if window is None else min(chunk.end, window)


def _padded(blocks: Sequence[int], length: int) -> list[int]:
    """The last block over and over: what is read there is masked, but must be finite."""
    return [*blocks, *[blocks[-1]] * (length - len(blocks))]


def _rows(batch: Sequence[Chunk], device: torch.device) -> Tensor | slice:
    rows = [chunk.row for chunk in batch]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))  # a view instead of a copy in every layer
    return upload(torch.tensor(rows), device)


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


def _bias(hidden: Tensor, query: Tensor) -> Tensor:
    """-inf where ``hidden``, else 0, as ``query`` is; torch's CPU kernel is faster with it than
    with booleans.
    """
    bias = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    return upload(bias, query.device)
