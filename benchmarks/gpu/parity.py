"""Every attention backend beside the reference, on the shapes of every size."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from benchmarks.gpu.findings import Finding, Target
from benchmarks.gpu.models import config_of
from gemma_serve.engine.config import AttentionSetting
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.selection import AttentionNeeds, select_attention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.quantization.fp8 import FP8

_BACKENDS: Final[tuple[AttentionSetting, ...]] = ("triton", "varlen", "sdpa")
_BLOCK_SIZE: Final = 16
_LARGEST_ERROR: Final = 0.05
"""Of outputs up to 4, where bfloat16's last bit is 0.016. A wrong mask is off by about 1."""

Backend = Callable[[KVCache, list[Chunk]], StepAttention]
"""Begins a step over a cache."""
Spans = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
"""Per sequence: ``(start, end, images)`` of what the step computes."""


def cases(window: int) -> Mapping[str, Spans]:
    """Steps that a wrong mask cannot get right, around the borders of blocks and windows."""
    return {
        "decode": tuple(
            (n - 1, n, ()) for n in (1, 15, 16, 17, window - 1, window, window + 1, 3 * window + 5)
        ),
        "prefill": ((0, 37, ()), (window - 5, window + 40, ()), (2 * window, 2 * window + 65, ())),
        "images": ((0, 90, ((5, 60),)), (window, window + 90, ((window + 7, window + 71),))),
        "mixed": ((99, 100, ()), (30, 95, ((40, 72),)), (window + 2, window + 3, ()), (0, 1, ())),
    }


def compare(size: str, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """The largest error of each backend over all cases, for each kind of cache it reads.

    Those that do not work here are left out.
    """
    config = config_of(size).get_text_config()
    layers = [device] * config.num_hidden_layers
    steps = cases(config.sliding_window).values()
    for name in _BACKENDS:
        for stored in (dtype, FP8):
            layout = CacheLayout.of(config, layers, stored).one_layer_per_window()
            backend = _backend(name, layout, config.num_attention_heads, dtype, steps)
            if backend is None:
                continue
            errors = [
                largest_error(backend, layout, dtype, config.num_attention_heads, spans)
                for spans in steps
            ]
            label = ", fp8 cache" if stored == FP8 else ""
            yield Finding(
                what=f"{size} attention, {name}{label}: error",
                value=max(errors),
                unit="",
                target=Target(limit=_LARGEST_ERROR, direction="at most"),
            )


def _backend(
    name: AttentionSetting,
    layout: CacheLayout,
    num_heads: int,
    dtype: torch.dtype,
    steps: Collection[Spans],
) -> Backend | None:
    """``None`` if it does not work on this machine or with this cache."""
    needs = AttentionNeeds(
        layout=layout,
        num_heads=num_heads,
        dtype=dtype,
        block_size=_BLOCK_SIZE,
        max_num_seqs=max(map(len, steps)),
        max_model_len=max(end for spans in steps for _, end, _ in spans),
    )
    try:
        selected = select_attention(name, needs)
    except ConfigurationError as obstacle:
        print(f"  left out: {obstacle}")
        return None
    return lambda cache, chunks: selected.over(cache).begin(cache, chunks)


@torch.inference_mode()
def largest_error(
    backend: Backend,
    layout: CacheLayout,
    dtype: torch.dtype,
    num_heads: int,
    spans: Spans,
) -> float:
    """The largest difference of the outputs in any layer. Both read the same keys and values.

    ``dtype``: of what is computed; the cache may store another.
    """
    num_blocks = sum(-(-end // _BLOCK_SIZE) for _, end, _ in spans) * len(layout.windows)
    cache = KVCache(layout, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
    chunks = _chunks(spans, num_blocks, len(layout.windows))
    generator = torch.Generator().manual_seed(0)
    device = layout.plane_devices[0]

    def random(num_rows: int, heads: int) -> Tensor:
        values = torch.randn(num_rows, heads, layout.head_dim, generator=generator)
        return values.to(device, dtype)

    slots = torch.arange(num_blocks * _BLOCK_SIZE, device=device)
    past = [random(len(slots), layout.num_kv_heads) for _ in range(2)]
    cache.write(0, slots, *past)
    num_rows = sum(end - start for start, end, _ in spans)
    errors = []
    for layer in range(len(layout.windows)):
        query = random(num_rows, num_heads)
        key, value = (random(num_rows, layout.num_kv_heads) for _ in range(2))
        # Scores of several units, so that a few keys decide: a mean over all would hide mistakes.
        scale = 2 * layout.head_dim**-0.5
        expected, found = (
            attention(cache, chunks).attend(layer, query, key, value, scale).float()
            for attention in (ReferenceAttention, backend)
        )
        errors.append((found - expected).abs().max())
    return float(torch.stack(errors).max())  # Python's max() would lose a NaN


def _chunks(spans: Spans, num_blocks: int, num_groups: int) -> list[Chunk]:
    """One for each span, in blocks that lie anywhere."""
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    chunks: list[Chunk] = []
    row = 0
    for start, end, images in spans:
        num = -(-end // _BLOCK_SIZE)
        blocks = tuple([free.pop() for _ in range(num)] for _ in range(num_groups))
        chunks.append(Chunk(row, start, end, images, blocks, blocks_id=(len(chunks), 0)))
        row += end - start
    return chunks
