"""Our own attention for CPUs, in the shapes of every Gemma 3 and over long histories."""

from functools import partial

import pytest
import torch

from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.native import NativeAttention
from gemma_serve.gemma.kv_cache import KVCache
from tests.gemma.native_kernels import needs_kernels
from tests.gemma.paged_step import PagedStep, assert_equal_to_reference, text

pytestmark = needs_kernels


def native(step: PagedStep, cache: KVCache) -> AttentionFactory:
    tables = BlockTables(cache, num_seats=len(step.spans), max_model_len=step.max_len)
    return partial(NativeAttention, tables)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(4, 1), (8, 4), (16, 8), (3, 3), (14, 2)], ids=str
)
@pytest.mark.parametrize("head_dim", [16, 48, 128, 256])
def test_heads_share_keys_in_groups_of_any_size(
    num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    step = PagedStep(
        spans=[text(39, 40), text(0, 5), text(20, 24)],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    assert_equal_to_reference(step, lambda cache: native(step, cache))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("end", [255, 256, 257, 512, 1300])
def test_a_long_history_is_cut_into_parts_and_joined(
    dtype: torch.dtype, stored: torch.dtype, end: int
) -> None:
    spans = [text(end - 1, end), text(end - 9, end), (end - 7, end, ((end - 7, end - 3),))]
    step = PagedStep(spans=spans, window=300, dtype=dtype, stored=stored)
    assert_equal_to_reference(step, lambda cache: native(step, cache))


def test_a_result_does_not_depend_on_the_neighbours() -> None:
    """To the bit, with more threads' work and with less."""
    alone = PagedStep(spans=[text(899, 900)])
    cache = KVCache(alone.layout(), num_blocks=4000, block_size=alone.block_size)
    for plane in cache.plane(0):
        plane.copy_(torch.randn(plane.shape, generator=alone.generator))
    together = PagedStep(spans=[text(899, 900), *(text(n - 1, n) for n in range(1, 700, 50))])
    chunks = together.chunks()
    query, key, value = together._random_heads()
    outputs = []
    for count in (1, len(chunks)):
        tables = BlockTables(cache, num_seats=count, max_model_len=900)
        attention = NativeAttention(tables, cache, chunks[:count])
        output = attention.attend(0, query[:count], key[:count], value[:count], 0.1)
        outputs.append(output[0])
    assert torch.equal(*outputs)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """A token whose key is a hundred times the others' sees itself alone."""
    step = PagedStep(spans=[text(599, 600)])
    cache = KVCache(step.layout(), num_blocks=400, block_size=step.block_size)
    attention = native(step, cache)(cache, step.chunks())
    key, value = torch.full((1, 2, 16), 100.0), torch.randn(1, 2, 16, generator=step.generator)
    output = attention.attend(0, torch.full((1, 4, 16), 100.0), key, value, 1.0)
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))
