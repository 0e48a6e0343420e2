"""Attention as its definition reads: the truth that faster backends are compared with."""

import torch
from torch import Tensor

from gemma_serve.gemma.attention.paged import PagedAttention, sequence_slots
from gemma_serve.gemma.attention.step import Chunk


class ReferenceAttention(PagedAttention):
    """One dense float32 mask and softmax per sequence and layer. Slow."""

    reads_fp8 = True

    def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return torch.cat([self._attend_chunk(c, layer, query, scale) for c in self._chunks])

    def _attend_chunk(self, chunk: Chunk, layer: int, query: Tensor, scale: float) -> Tensor:
        window = self._window(layer)
        first_key = 0 if window is None else max(0, chunk.start - window + 1)
        blocks = chunk.blocks[self._cache.layout.places[layer].group]
        slots = sequence_slots(blocks, first_key, chunk.end, self._cache.block_size)
        keys, values = self._cache.read(layer, slots.to(query.device), torch.float32)
        queries = query[chunk.row : chunk.row + chunk.end - chunk.start].float().transpose(0, 1)
        group_size = queries.shape[0] // keys.shape[1]
        keys = keys.transpose(0, 1).repeat_interleave(group_size, 0)
        values = values.transpose(0, 1).repeat_interleave(group_size, 0)
        visible = _visible(chunk, first_key, window).to(query.device)
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ values).transpose(0, 1).to(query.dtype)


def _visible(chunk: Chunk, first_key: int, window: int | None) -> Tensor:
    """Which keys each query sees: ``[num_queries, num_keys]`` bool."""
    queries = torch.arange(chunk.start, chunk.end)[:, None]
    keys = torch.arange(first_key, chunk.end)[None, :]
    visible = keys <= queries
    for start, end in chunk.images:
        visible |= (start <= queries) & (queries < end) & (start <= keys) & (keys < end)
    if window is not None:
        visible &= keys > queries - window
    return visible
