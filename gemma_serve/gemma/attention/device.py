"""Attention by kernels that read block tables: what a step tells them, in one copy.

Every token says what it sees: a query at position ``p`` sees the keys from ``p - window + 1`` up to
its ``key_end``, which is ``p + 1`` for text and the end of its image for an image's token. That is
the whole masking rule, so text and images, prompts and answers are computed by the same kernels.
A token without a key, ``key_end`` 0, is padding: it is neither written nor attends.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_serve.engine.transfers import upload
from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Tokens of one sequence that a kernel computes together."""

    short: int
    """Chunks up to this length share their keys among many programs: they have few queries."""
    long: int


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The tokens of one step on one device, all int64.

    A *tile* is ``(first row, number of rows)`` of tokens of one sequence.
    """

    positions: Tensor
    """``[num_tokens]``"""
    key_ends: Tensor
    """``[num_tokens]``: the first position that is not seen."""
    seats: Tensor
    """``[num_tokens]``: in the block tables."""
    short_tiles: Tensor
    """``[num_tiles, 2]``"""
    long_tiles: Tensor
    """``[num_tiles, 2]``"""

    def to(self, device: torch.device) -> "StepTokens":
        return StepTokens(
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (
                    self.positions,
                    self.key_ends,
                    self.seats,
                    self.short_tiles,
                    self.long_tiles,
                )
            )
        )


def upload_columns(columns: Sequence["array[int]"], device: torch.device) -> tuple[Tensor, ...]:
    """Copy numbers to ``device`` all at once and without waiting: int64, one tensor per column."""
    joined = array("q")
    for column in columns:
        joined.extend(column)
    # frombuffer refuses empty buffers.
    host = torch.frombuffer(joined, dtype=torch.int64) if joined else torch.empty(0).long()
    return torch.split(upload(host, device), [len(column) for column in columns])


class DeviceAttention(StepAttention):
    """Hands each layer's planes, table and tokens to kernels."""

    def __init__(self, cache: KVCache, tables: BlockTables, tokens: StepTokens) -> None:
        self._cache = cache
        self._tables = tables
        self._first_device = tokens.positions.device
        self._tokens = {self._first_device: tokens}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As ``StepAttention.attend``."""
        tokens = self._tokens_on(query.device)
        self._write(layer, tokens, key, value)
        return self._attend(layer, tokens, query, scale)

    @abstractmethod
    def _write(self, layer: int, tokens: StepTokens, key: Tensor, value: Tensor) -> None:
        """Store the step's keys and values."""

    @abstractmethod
    def _attend(self, layer: int, tokens: StepTokens, query: Tensor, scale: float) -> Tensor:
        """As ``attend``, after the keys and values were written."""

    def _table(self, layer: int, device: torch.device) -> Tensor:
        """``[num_seats, max_blocks]`` int32."""
        return self._tables.on(device)[self._cache.layout.places[layer].group]

    def _window(self, layer: int) -> int | None:
        layout = self._cache.layout
        return layout.windows[layout.places[layer].group]

    def _tokens_on(self, device: torch.device) -> StepTokens:
        if device not in self._tokens:
            self._tokens[device] = self._tokens[self._first_device].to(device)
        return self._tokens[device]


class DeviceBackend(ABC):
    """Kernels over one cache, and the tables that tell them where its keys and values lie."""

    def __init__(self, cache: KVCache, tables: BlockTables, tile_sizes: TileSizes) -> None:
        self.cache = cache
        self.tables = tables
        self._tile_sizes = tile_sizes

    @abstractmethod
    def over(self, tokens: StepTokens) -> StepAttention:
        """Attention of the step that ``tokens`` describe; replayed, of what they hold then."""

    def begin(self, cache: KVCache, chunks: Sequence[Chunk]) -> StepAttention:
        """An ``AttentionFactory`` for the cache that the backend was made for."""
        assert cache is self.cache
        changes = self.tables.changes(chunks)
        columns = (
            changes.places,
            changes.blocks,
            *token_columns(chunks, changes.seats),
            *_tiles(chunks, self._tile_sizes),
        )
        places, blocks, positions, key_ends, seats, short_tiles, long_tiles = upload_columns(
            columns, cache.layout.plane_devices[0]
        )
        self.tables.apply(changes, places, blocks)
        tiles = (short_tiles.view(-1, 2), long_tiles.view(-1, 2))
        return self.over(StepTokens(positions, key_ends, seats, *tiles))


def token_columns(
    chunks: Sequence[Chunk], seats: Sequence[int]
) -> tuple["array[int]", "array[int]", "array[int]"]:
    """Position, key end and seat of every token, as in ``StepTokens``."""
    positions, key_ends, seat_column = array("q"), array("q"), array("q")
    for chunk, seat in zip(chunks, seats, strict=True):
        positions.extend(range(chunk.start, chunk.end))
        key_ends.extend(_key_ends(chunk))
        seat_column.extend(array("q", [seat]) * (chunk.end - chunk.start))
    return positions, key_ends, seat_column


def _key_ends(chunk: Chunk) -> "array[int]":
    key_ends = array("q", range(chunk.start + 1, chunk.end + 1))
    for start, end in chunk.images:
        key_ends[start - chunk.start : end - chunk.start] = array("q", [end]) * (end - start)
    return key_ends


def _tiles(chunks: Sequence[Chunk], sizes: TileSizes) -> tuple["array[int]", "array[int]"]:
    """Short ones and long ones."""
    short_tiles, long_tiles = array("q"), array("q")
    for chunk in chunks:
        num_tokens = chunk.end - chunk.start
        if num_tokens <= sizes.short:
            short_tiles.extend((chunk.row, num_tokens))
            continue
        for first in range(0, num_tokens, sizes.long):
            long_tiles.extend((chunk.row + first, min(sizes.long, num_tokens - first)))
    return short_tiles, long_tiles
