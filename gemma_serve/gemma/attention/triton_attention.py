"""Paged attention by our own Triton kernels; for GPUs, or any machine with Triton's interpreter.

Not measured on a GPU: tile sizes follow from what fits shared memory and registers when the kernels
are compiled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import (
    DeviceAttention,
    DeviceBackend,
    StepTokens,
    TileSizes,
)
from gemma_serve.gemma.attention.triton_kernels import attend_kernel, join_kernel, write_kernel
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.launching import launching_on, padded
from gemma_serve.gemma.quantization.fp8 import FP8

_LOG2_E: Final = math.log2(math.e)

_MIN_ROWS: Final = 16
"""The fewest rows that a tensor core multiplies."""

_MAX_SPLITS: Final = 32
"""Programs that share one sequence's keys. Those of a 27B layer's 16 KV heads then fill any GPU."""

_PROGRAMS_PER_MULTIPROCESSOR: Final = 3
"""As many short ones as a multiprocessor's registers hold: each takes up to 168 per thread."""

_NUM_STAGES: Final = 3
"""While one tile of keys and values is used, the next is loaded, and so are the entries of the
block table for the one after it. With fewer stages, the loads of a tile wait for its entries."""

_NUM_BUFFERS: Final = 2
"""Tiles of keys, and as many of values, in shared memory at once, at most; of short chunks, which
no warp group multiplies, one."""

_SCRATCH_BYTES: Final = 1024
"""Of shared memory, for sums over rows and entries of the table."""

_SHARE_OF_SHORT: Final = 0.3
"""Of a multiprocessor's shared memory, so that several programs fit it, of which one loads while
others compute."""

_SHORT_TILES: Final = ((_MIN_ROWS, 64), (_MIN_ROWS, 32), (_MIN_ROWS, 16))
_LONG_TILES: Final = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 16))
"""Rows and keys, the best first."""


@dataclass(frozen=True, slots=True)
class GpuProperties:
    """What kernels must fit, and how many programs fill it."""

    shared_bytes: int
    """Shared memory that one program may have."""
    num_multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> Self:
        if device.type != "cuda":  # for the interpreter: what any GPU has, and enough to split keys
            return cls(96 * 1024, 4)
        properties = torch.cuda.get_device_properties(device)
        # Not every build of torch tells of more than the 48 KiB that all programs get.
        shared_bytes: int = getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        )
        return cls(shared_bytes, properties.multi_processor_count)


@dataclass(frozen=True, slots=True)
class _Shape:
    """One compiled form of the attention kernel."""

    rows: int
    keys: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class _Kernel:
    shape: _Shape
    num_splits: int


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """How the kernels are launched for one model on one kind of GPU."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    short: _Shape
    """For few queries: reads keys as fast as memory gives them."""
    long: _Shape
    """For prompts: multiplies."""
    num_multiprocessors: int

    @classmethod
    def of(
        cls, layout: CacheLayout, num_heads: int, dtype: torch.dtype, gpu: GpuProperties
    ) -> Self:
        """``dtype``: what is computed; the cache may store another."""
        row_bytes = layout.head_dim * dtype.itemsize
        group_rows = padded(num_heads // layout.num_kv_heads)
        rows, keys = _largest_tile(_LONG_TILES, gpu.shared_bytes, row_bytes, _NUM_BUFFERS)
        short_bytes = int(_SHARE_OF_SHORT * gpu.shared_bytes)
        _, short_keys = _largest_tile(_SHORT_TILES, short_bytes, row_bytes, num_buffers=1)
        return cls(
            num_heads=num_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            short=_Shape(max(_MIN_ROWS, group_rows), short_keys, num_warps=4),
            # With fewer warps, a thread's registers would not hold its part of 64 rows.
            long=_Shape(max(rows, group_rows), keys, num_warps=8 if rows >= 64 else 4),
            num_multiprocessors=gpu.num_multiprocessors,
        )

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_sizes(self) -> TileSizes:
        group_rows = padded(self.group_size)
        return TileSizes(self.short.rows // group_rows, self.long.rows // group_rows)

    def num_splits(self, num_tiles: int) -> int:
        """Programs per tile and KV head that it takes to fill the GPU."""
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * self.num_multiprocessors
        return min(_MAX_SPLITS, max(1, num_programs // (num_tiles * self.num_kv_heads)))


def _largest_tile(
    tiles: Sequence[tuple[int, int]], num_bytes: int, row_bytes: int, num_buffers: int
) -> tuple[int, int]:
    """The first of ``tiles`` whose queries, keys and values fit ``num_bytes``, or the last."""
    for rows, keys in tiles:
        if (rows + 2 * num_buffers * keys) * row_bytes + _SCRATCH_BYTES <= num_bytes:
            return rows, keys
    return tiles[-1]


class TritonBackend(DeviceBackend):
    """Attention over one cache by Triton's kernels."""

    def __init__(
        self,
        cache: KVCache,
        tables: BlockTables,
        num_heads: int,
        dtype: torch.dtype,
        gpu: GpuProperties | None = None,
    ) -> None:
        """``num_heads``: of queries. ``dtype``: of what is computed. ``gpu``: by default the one
        that the cache's first plane is on; others are taken to be alike."""
        gpu = gpu or GpuProperties.of(cache.layout.plane_devices[0])
        self._plan = KernelPlan.of(cache.layout, num_heads, dtype, gpu)
        super().__init__(cache, tables, self._plan.tile_sizes)

    def over(self, tokens: StepTokens) -> "TritonAttention":
        """As ``DeviceBackend.over``."""
        return TritonAttention(self.cache, self.tables, tokens, self._plan)


class TritonAttention(DeviceAttention):
    """One launch writes, one attends for short chunks and one for long ones."""

    def __init__(
        self, cache: KVCache, tables: BlockTables, tokens: StepTokens, plan: KernelPlan
    ) -> None:
        super().__init__(cache, tables, tokens)
        self._plan = plan

    def _write(self, layer: int, tokens: StepTokens, key: Tensor, value: Tensor) -> None:
        key_plane, value_plane = self._cache.plane(layer)
        if is_fp8 := key_plane.dtype == FP8:
            key_plane, value_plane = key_plane.view(torch.uint8), value_plane.view(torch.uint8)
        table = self._table(layer, key.device)
        width = key_plane.shape[1]
        with launching_on(key.device):
            write_kernel[(len(key),)](
                key,
                value,
                key_plane,
                value_plane,
                tokens.positions,
                tokens.key_ends,
                tokens.seats,
                table,
                key.stride(0),
                value.stride(0),
                key_plane.stride(0),
                table.stride(0),
                BLOCK_SIZE=self._cache.block_size,
                WIDTH=width,
                PADDED_WIDTH=padded(width),
                IS_FP8=is_fp8,
            )

    def _attend(self, layer: int, tokens: StepTokens, query: Tensor, scale: float) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        with launching_on(query.device):
            if num_tiles := len(tokens.short_tiles):
                kernel = _Kernel(self._plan.short, self._plan.num_splits(num_tiles))
                self._launch(kernel, layer, tokens, tokens.short_tiles, query, output, scale)
            if len(tokens.long_tiles):
                kernel = _Kernel(self._plan.long, num_splits=1)
                self._launch(kernel, layer, tokens, tokens.long_tiles, query, output, scale)
        return output

    def _launch(
        self,
        kernel: _Kernel,
        layer: int,
        tokens: StepTokens,
        tiles: Tensor,
        query: Tensor,
        output: Tensor,
        scale: float,
    ) -> None:
        plan, shape, num_splits = self._plan, kernel.shape, kernel.num_splits
        key_plane, value_plane = self._cache.plane(layer)
        table = self._table(layer, query.device)
        is_split = num_splits > 1
        num_rows = len(tiles) * plan.num_kv_heads * shape.rows if is_split else 0
        parts = query.new_empty((num_rows, num_splits, plan.head_dim), dtype=torch.float32)
        maxima, sums = query.new_empty((2, num_rows, num_splits), dtype=torch.float32).unbind()
        heads = {
            "NUM_HEADS": plan.num_heads,
            "GROUP_SIZE": plan.group_size,
            "PADDED_GROUP_SIZE": padded(plan.group_size),
            "HEAD_DIM": plan.head_dim,
            "TILE_ROWS": shape.rows,
        }
        attend_kernel[(len(tiles), plan.num_kv_heads, num_splits)](
            output,
            parts,
            maxima,
            sums,
            query,
            key_plane,
            value_plane,
            tokens.positions,
            tokens.key_ends,
            tokens.seats,
            table,
            tiles,
            query.stride(0),
            key_plane.stride(0),
            table.stride(0),
            scale * _LOG2_E,
            num_splits,
            **heads,
            BLOCK_SIZE=self._cache.block_size,
            WINDOW=self._window(layer) or 0,
            IS_SPLIT=is_split,
            TILE_KEYS=shape.keys,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=shape.num_warps,
            num_stages=_NUM_STAGES,
        )
        if is_split:
            join_kernel[(len(tiles), plan.num_heads)](
                output,
                parts,
                maxima,
                sums,
                tiles,
                num_splits,
                **heads,
                MAX_SPLITS=_MAX_SPLITS,
            )
