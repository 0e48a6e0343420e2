"""Attention for CPUs: answers by our own kernel, which reads pages, and prompts by torch's."""

from array import array
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import token_columns, upload_columns
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.native.build import BuildError
from gemma_serve.gemma.native.library import (
    HEAD_DIM_MULTIPLE,
    MAX_HEAD_DIM,
    Pages,
    native_kernels,
)

_MAX_SHORT_CHUNK: Final = 16
"""Tokens of one sequence that are computed each by itself. Of more, torch multiplies the keys of
all at once."""


class NativeAttention(SdpaAttention):
    """One call writes the step's keys and values, and one attends for all short chunks."""

    reads_fp8 = False

    def __init__(self, tables: BlockTables, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        """With ``tables`` bound, it is an ``AttentionFactory``."""
        long_chunks = [chunk for chunk in chunks if not _is_short(chunk)]
        super().__init__(cache, long_chunks)
        self._has_long_chunks = bool(long_chunks)
        self._has_short_chunks = len(long_chunks) < len(chunks)
        self._kernels = native_kernels()
        (self._device,) = set(cache.layout.plane_devices)
        self._tables = tables
        changes = tables.changes(chunks)
        rows = array("q")
        for chunk in chunks:
            if _is_short(chunk):
                rows.extend(range(chunk.row, chunk.row + chunk.end - chunk.start))
        columns = (changes.places, changes.blocks, rows, *token_columns(chunks, changes.seats))
        places, blocks, self._short_rows, *self._tokens = upload_columns(columns, self._device)
        tables.apply(changes, places, blocks)
        self._pages: dict[int, Pages] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As ``StepAttention.attend``."""
        pages = self._pages_of(self._cache.layout.places[layer].group)
        key_plane, value_plane = self._cache.plane(layer)
        self._kernels.write_kv(pages, key_plane, value_plane, key, value)
        output = torch.empty(query.shape, dtype=query.dtype)
        if self._has_short_chunks:
            self._kernels.attend(
                pages, output, query, key_plane, value_plane, self._short_rows, scale
            )
        if self._has_long_chunks:
            self._attend_into(output, layer, query, scale)
        return output

    def _pages_of(self, group: int) -> Pages:
        if group not in self._pages:
            positions, key_ends, seats = self._tokens
            self._pages[group] = Pages(
                self._tables.on(self._device)[group],
                self._cache.block_size,
                positions=positions,
                key_ends=key_ends,
                seats=seats,
                window=self._cache.layout.windows[group],
            )
        return self._pages[group]


def missing_for_native(layout: CacheLayout) -> str | None:
    """Why this machine or model has no such attention; ``None`` if it may."""
    if any(device.type != "cpu" for device in layout.plane_devices):
        return "it is for CPUs"
    if layout.head_dim % HEAD_DIM_MULTIPLE or layout.head_dim > MAX_HEAD_DIM:
        return (
            f"it needs heads of a multiple of {HEAD_DIM_MULTIPLE} numbers, at most {MAX_HEAD_DIM}, "
            f"and these have {layout.head_dim}"
        )
    try:
        native_kernels()
    except BuildError as error:
        return str(error)
    return None


def _is_short(chunk: Chunk) -> bool:
    return chunk.end - chunk.start <= _MAX_SHORT_CHUNK
