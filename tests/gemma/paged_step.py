"""One layer of each kind over a cache full of random keys, and steps over it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache, LayerPlace

CPU = torch.device("cpu")

Span = tuple[int, int, tuple[tuple[int, int], ...]]
"""Start, end and images of a chunk."""


def text(start: int, end: int) -> Span:
    return start, end, ()


@dataclass(frozen=True, kw_only=True)
class PagedStep:
    """What a step computes, and over which cache. Layer 0 sees everything, layer 1 a window."""

    spans: Sequence[Span]
    window: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    """What the cache holds; by default ``dtype``."""
    device: torch.device = CPU
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def max_len(self) -> int:
        return max(end for _, end, _ in self.spans)

    def layout(self) -> CacheLayout:
        return CacheLayout(
            windows=(None, self.window),
            places=(LayerPlace(0, 0), LayerPlace(1, 0)),
            plane_devices=(self.device,),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.stored or self.dtype,
        )

    def chunks(self) -> list[Chunk]:
        """Sequences in blocks that stand anywhere."""
        free = torch.randperm(self._num_blocks, generator=self.generator).tolist()
        chunks = []
        row = 0
        for index, (start, end, images) in enumerate(self.spans):
            num_blocks = -(-end // self.block_size)
            blocks = tuple([free.pop() for _ in range(num_blocks)] for _ in range(2))
            chunks.append(Chunk(row, start, end, images, blocks, blocks_id=(index, 0)))
            row += end - start
        return chunks

    def outputs(
        self, begin: Callable[[KVCache], AttentionFactory]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each layer, by the reference and by another attention.

        Asserts that both leave the same keys and values in the cache.
        """
        caches = [
            KVCache(self.layout(), num_blocks=self._num_blocks, block_size=self.block_size)
            for _ in range(2)
        ]
        self._fill(caches)
        chunks = self.chunks()
        attentions = (ReferenceAttention(caches[0], chunks), begin(caches[1])(caches[1], chunks))
        results: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in range(2):
            query, key, value = self._random_heads()
            scale = 1.5 * self.head_dim**-0.5
            for attention, of_attention in zip(attentions, results, strict=True):
                of_attention.append(attention.attend(layer, query, key, value, scale))
            for expected, got in zip(caches[0].plane(0), caches[1].plane(0), strict=True):
                assert torch.equal(expected.float(), got.float())
        return results

    @property
    def _num_blocks(self) -> int:
        return 2 * sum(-(-end // self.block_size) for _, end, _ in self.spans)

    def _fill(self, caches: Sequence[KVCache]) -> None:
        for planes in zip(*(cache.plane(0) for cache in caches), strict=True):
            values = torch.randn(planes[0].shape, generator=self.generator)
            for plane in planes:
                plane.copy_(values)

    def _random_heads(self) -> list[Tensor]:
        """Query, key and value as the decoder hands them over: parts of one tensor."""
        num_tokens = sum(end - start for start, end, _ in self.spans)
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        shape = (num_tokens, sum(sizes), self.head_dim)
        heads = torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
        return list(torch.split(heads, sizes, dim=1))


def assert_equal_to_reference(
    step: PagedStep, begin: Callable[[KVCache], AttentionFactory]
) -> None:
    """Up to rounding, of which 16 bits have more."""
    tolerance = 1e-5 if step.dtype == torch.float32 else 4e-3
    expected, got = step.outputs(begin)
    for of_reference, ours in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, of_reference, atol=tolerance, rtol=tolerance)
