"""A small step by one kind of attention and by the reference, on the machine that will serve."""

from collections.abc import Callable

import torch

from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache

_NUM_SEQUENCES = 3


def trial_len(layout: CacheLayout) -> int:
    """Tokens of the trial's sequences: just longer than the window."""
    return max(window or 0 for window in layout.windows) + 70


@torch.inference_mode()
def difference_from_reference(
    begin: Callable[[KVCache], AttentionFactory],
    layout: CacheLayout,
    *,
    num_heads: int,
    dtype: torch.dtype,
    block_size: int,
) -> float:
    """The largest difference of two outputs, in a layer of each kind; outputs are about 1.

    ``dtype``: of what is computed; the cache may store another.
    Two sequences decode, one before and one behind a window, and one computes text and an image.
    """
    small = layout.one_layer_per_window()
    num_tokens = trial_len(layout)
    num_blocks = _NUM_SEQUENCES * len(small.windows) * -(-num_tokens // block_size)
    caches = [KVCache(small, num_blocks=num_blocks, block_size=block_size) for _ in range(2)]
    chunks = _chunks(num_tokens, num_blocks, block_size, len(small.windows))
    attentions = (ReferenceAttention(caches[0], chunks), begin(caches[1])(caches[1], chunks))
    generator = torch.Generator().manual_seed(0)
    num_step_tokens = sum(chunk.end - chunk.start for chunk in chunks)
    num_all_heads = num_heads + 2 * small.num_kv_heads
    # The plane of the cache is shared by the layers, in blocks of their own.
    for plane, copy in zip(caches[0].plane(0), caches[1].plane(0), strict=True):
        plane.copy_(torch.randn(plane.shape, generator=generator))
        copy.copy_(plane)
    differences = []
    for layer in range(len(small.windows)):
        heads = torch.randn(
            (num_step_tokens, num_all_heads, small.head_dim), generator=generator
        ).to(small.plane_devices[0], dtype)
        query, key, value = torch.split(
            heads, [num_heads, small.num_kv_heads, small.num_kv_heads], dim=1
        )
        # Scores of up to about 10, so that each query sees a few keys and not the mean of all.
        scale = 3 * small.head_dim**-0.5
        expected, got = (a.attend(layer, query, key, value, scale).float() for a in attentions)
        differences.append((expected - got).abs().max().item())
    # max() would lose a NaN that is not the first.
    return torch.tensor(differences).max().item()


def _chunks(num_tokens: int, num_blocks: int, block_size: int, num_groups: int) -> list[Chunk]:
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    end = num_tokens
    spans = ((end - 1, end, ()), (8, 9, ()), (end - 69, end, ((end - 60, end - 20),)))
    chunks = []
    row = 0
    for index, (start, end, images) in enumerate(spans):
        blocks = tuple(
            [free.pop() for _ in range(-(-end // block_size))] for _ in range(num_groups)
        )
        chunks.append(Chunk(row, start, end, images, blocks, blocks_id=(index, 0)))
        row += end - start
    return chunks
