"""Our kernels equal the reference; in Triton's interpreter where there is no GPU.

The interpreter multiplies the bits of bfloat16 as if they were integers, so float16 stands for 16
bits here.
"""

from dataclasses import replace

import pytest
import torch

from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.kv_cache import KVCache
from tests.gemma.paged_step import PagedStep, Span, assert_equal_to_reference, text

pytest.importorskip("triton", reason="needs the package triton, which comes with torch for CUDA")

# Behind the check, as it imports Triton.
from gemma_serve.gemma.attention.triton_attention import KernelPlan, TritonBackend

WINDOW = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_backend(step: PagedStep, cache: KVCache) -> AttentionFactory:
    tables = BlockTables(cache, num_seats=len(step.spans), max_model_len=step.max_len)
    return TritonBackend(cache, tables, step.num_heads).begin


def assert_kernels_equal_reference(step: PagedStep) -> None:
    step = replace(step, device=DEVICE)
    assert_equal_to_reference(step, lambda cache: triton_backend(step, cache))


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([text(n - 1, n) for n in (1, 15, 16, 17, 50)], id="decoding"),
        pytest.param([text(0, 17), text(15, 16), text(3, 40)], id="prompts beside an answer"),
        pytest.param([(0, 20, ((0, 4), (6, 10))), (36, 41, ((37, 41),))], id="images"),
        pytest.param([(2, 40, ((5, 30),))], id="an image longer than the window"),
    ],
)
@pytest.mark.parametrize("block_size", [4, 7])
def test_every_query_sees_its_window_and_its_image(spans: list[Span], block_size: int) -> None:
    assert_kernels_equal_reference(
        PagedStep(spans=spans, window=WINDOW, num_kv_heads=1, block_size=block_size)
    )


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(4, 1), (2, 2), (6, 2)], ids=["one", "many", "groups of three"]
)
def test_any_number_of_heads_shares_a_kv_head(num_heads: int, num_kv_heads: int) -> None:
    spans = [text(30, 31), text(0, 12)]
    assert_kernels_equal_reference(
        PagedStep(spans=spans, num_heads=num_heads, num_kv_heads=num_kv_heads)
    )


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_heads_of_gemma_in_both_precisions(head_dim: int, dtype: torch.dtype) -> None:
    spans = [text(40, 41), text(2, 14)]
    assert_kernels_equal_reference(
        PagedStep(
            spans=spans, num_heads=2, num_kv_heads=1, head_dim=head_dim, block_size=16, dtype=dtype
        )
    )


def test_one_long_sequence_is_shared_out_and_many_short_ones_are_not() -> None:
    step = PagedStep(spans=[text(300, 301)], num_kv_heads=1)
    cache = KVCache(step.layout(), num_blocks=1, block_size=4)
    plan = KernelPlan.of(cache, step.num_heads)
    assert plan.num_splits(1) > 1
    assert plan.num_splits(10_000) == 1
    assert_kernels_equal_reference(step)
    assert_kernels_equal_reference(PagedStep(spans=[text(n, n + 1) for n in range(16)]))
