"""What every attention backend shares: keys and values are written into pages, then attended over.

Masking is the backend's whole duty: nothing else in the model knows windows or images.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gemma_serve.engine.transfers import upload
from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import KVCache


class PagedAttention(StepAttention):
    """Attention that the host plans, sequence by sequence."""

    reads_fp8: ClassVar[bool] = False
    """Whether the cache may hold float8: only what reads it through ``KVCache.read`` need not know
    how it is stored."""

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        self._chunks = chunks
        self._slots: dict[torch.device, tuple[Tensor, ...]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As ``StepAttention.attend``."""
        group = self._cache.layout.places[layer].group
        slots = self._slots_of_step(group, query.device)
        self._cache.write(layer, slots, key, value)
        return self._attend(layer, query, scale)

    @abstractmethod
    def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """As ``attend``, after the keys and values were written."""

    def _slots_of_step(self, group: int, device: torch.device) -> Tensor:
        """Where the step's keys and values go in one group: ``[num_tokens]`` int64."""
        if device not in self._slots:
            groups = range(len(self._cache.layout.windows))
            slots = torch.tensor([self._new_slots(g) for g in groups], dtype=torch.int64)
            self._slots[device] = upload(slots, device).unbind()
        return self._slots[device][group]

    def _new_slots(self, group: int) -> list[int]:
        # Lists, as most chunks are one token long, and a tensor for each costs more than it saves.
        block_size = self._cache.block_size
        return [
            chunk.blocks[group][position // block_size] * block_size + position % block_size
            for chunk in self._chunks
            for position in range(chunk.start, chunk.end)
        ]

    def _window(self, layer: int) -> int | None:
        layout = self._cache.layout
        return layout.windows[layout.places[layer].group]


def sequence_slots(blocks: Sequence[int], start: int, end: int, block_size: int) -> Tensor:
    """Slots of the positions ``[start, end)``: ``[end - start]`` int64."""
    first_block = start // block_size
    used = torch.tensor(blocks[first_block : -(-end // block_size)], dtype=torch.int64)
    slots = (used[:, None] * block_size + torch.arange(block_size)).flatten()
    return slots[start - first_block * block_size : end - first_block * block_size]
