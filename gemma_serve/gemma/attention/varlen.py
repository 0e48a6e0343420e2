"""Attention by torch's FlashAttention over pages, where the installed torch has it.

``torch.nn.attention.varlen.varlen_attn`` takes block tables from torch 2.12 on; which sizes of
blocks depends on the FlashAttention behind it (3: any, after ``activate_flash_attention_impl``; 2:
multiples of 256, if at all), so ``selection`` tries it out. Its kernels know no masks but causal
ones and windows: a chunk is cut into segments at the borders of images, and those of each kind are
computed in one call. Not measured on a GPU.
"""

import importlib
import inspect
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import upload_columns
from gemma_serve.gemma.attention.paged import PagedAttention
from gemma_serve.gemma.attention.step import Chunk, Segment
from gemma_serve.gemma.kv_cache import KVCache

VarlenAttn = Callable[..., Tensor]
"""Has the signature of torch's."""


def installed_varlen_attn() -> VarlenAttn | None:
    """torch's function, if it is there and takes block tables."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    function: VarlenAttn = module.varlen_attn
    return function if "block_table" in inspect.signature(function).parameters else None


@dataclass(frozen=True, slots=True)
class _Kind:
    """The segments of one kind, in the order of their rows."""

    causal: bool
    segments: tuple[Segment, ...]
    seats: tuple[int, ...]

    @property
    def max_queries(self) -> int:
        return max(segment.num_tokens for segment in self.segments)

    @property
    def max_keys(self) -> int:
        return max(segment.end for segment in self.segments)

    def window_size(self, window: int | None) -> tuple[int, int]:
        """Keys before and behind each query's own; -1: all."""
        return (-1 if window is None else window - 1, 0 if self.causal else -1)

    def columns(self) -> tuple["array[int]", ...]:
        """What ``_OnDevice`` holds."""
        rows = array("q")
        for segment in self.segments:
            rows.extend(range(segment.row, segment.row + segment.num_tokens))
        query_starts = accumulate((s.num_tokens for s in self.segments), initial=0)
        ends = array("q", [segment.end for segment in self.segments])
        return rows, array("q", query_starts), ends, array("q", self.seats)


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """A kind's numbers on one device."""

    rows: Tensor
    """``[num_tokens]`` int64: where its tokens stand in the step."""
    query_starts: Tensor
    """``[num_segments + 1]`` int32: among the kind's tokens."""
    ends: Tensor
    """``[num_segments]`` int32: keys that the last query sees, from the sequence's first on."""
    seats: Tensor
    """``[num_segments]`` int64"""


class VarlenAttention(PagedAttention):
    """Keys and values are written by torch, and attended over in one or two calls per layer."""

    def __init__(
        self,
        varlen_attn: VarlenAttn,
        tables: BlockTables,
        cache: KVCache,
        chunks: Sequence[Chunk],
    ) -> None:
        """With the first two bound, it is an ``AttentionFactory``."""
        super().__init__(cache, chunks)
        self._varlen_attn = varlen_attn
        self._tables = tables
        changes = tables.changes(chunks)
        places, blocks = upload_columns(
            (changes.places, changes.blocks), cache.layout.plane_devices[0]
        )
        tables.apply(changes, places, blocks)
        self._kinds = _kinds(chunks, changes.seats)
        self._on_device: dict[tuple[_Kind, torch.device], _OnDevice] = {}
        self._block_tables: dict[tuple[_Kind, int, torch.device], Tensor] = {}

    def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        if len(self._kinds) == 1:
            return self._attend_kind(self._kinds[0], layer, query.contiguous(), scale)
        output = torch.empty_like(query)
        for kind in self._kinds:
            rows = self._numbers(kind, query.device).rows
            output.index_copy_(
                0, rows, self._attend_kind(kind, layer, query.index_select(0, rows), scale)
            )
        return output

    def _attend_kind(self, kind: _Kind, layer: int, query: Tensor, scale: float) -> Tensor:
        layout = self._cache.layout
        pages = (-1, self._cache.block_size, layout.num_kv_heads, layout.head_dim)
        keys, values = (plane.view(pages) for plane in self._cache.plane(layer))
        numbers = self._numbers(kind, query.device)
        return self._varlen_attn(
            query,
            keys,
            values,
            numbers.query_starts,
            None,
            kind.max_queries,
            kind.max_keys,
            scale=scale,
            window_size=kind.window_size(self._window(layer)),
            enable_gqa=True,
            seqused_k=numbers.ends,
            block_table=self._block_table(kind, layer, query.device),
        )

    def _numbers(self, kind: _Kind, device: torch.device) -> _OnDevice:
        key = (kind, device)
        if key not in self._on_device:
            rows, query_starts, ends, seats = upload_columns(kind.columns(), device)
            self._on_device[key] = _OnDevice(rows, query_starts.int(), ends.int(), seats)
        return self._on_device[key]

    def _block_table(self, kind: _Kind, layer: int, device: torch.device) -> Tensor:
        """``[num_segments, max_blocks]`` int32."""
        group = self._cache.layout.places[layer].group
        key = (kind, group, device)
        if key not in self._block_tables:
            table = self._tables.on(device)[group]
            self._block_tables[key] = table.index_select(0, self._numbers(kind, device).seats)
        return self._block_tables[key]


def _kinds(chunks: Sequence[Chunk], seats: Sequence[int]) -> list[_Kind]:
    pairs = [
        (segment, seat)
        for chunk, seat in zip(chunks, seats, strict=True)
        for segment in chunk.segments()
    ]
    kinds = []
    for causal in (True, False):
        if ours := [pair for pair in pairs if pair[0].causal is causal]:
            segments, their_seats = zip(*ours, strict=True)
            kinds.append(_Kind(causal, segments, their_seats))
    return kinds
