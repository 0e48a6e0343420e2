"""Our kernels equal the reference; in Triton's interpreter where there is no GPU.

The interpreter multiplies the bits of bfloat16 as if they were integers, so float16 stands for 16
bits here.
"""

from dataclasses import replace

import pytest
import torch

from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import KVCache
from gemma_serve.gemma.quantization.fp8 import FP8
from tests.gemma.paged_step import PagedStep, Span, assert_equal_to_reference, text

pytest.importorskip("triton", reason="needs the package triton, which comes with torch for CUDA")

# Behind the check, as it imports Triton.
from gemma_serve.gemma.attention.triton_attention import GpuProperties, KernelPlan, TritonBackend

WINDOW = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_backend(step: PagedStep, cache: KVCache) -> AttentionFactory:
    tables = BlockTables(cache, num_seats=len(step.spans), max_model_len=step.max_len)
    return TritonBackend(cache, tables, step.num_heads, step.dtype).begin


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cache_in_8_bits_is_written_and_read(dtype: torch.dtype) -> None:
    spans = [text(40, 41), text(2, 14), (20, 31, ((22, 28),))]
    assert_kernels_equal_reference(
        PagedStep(spans=spans, dtype=dtype, stored=FP8, window=WINDOW, block_size=7)
    )


def test_every_number_is_stored_as_the_nearest_of_8_bits() -> None:
    """Those of 8 bits, all halfway between two of them, and what is nearest to and beyond these."""
    step = PagedStep(spans=[text(0, 16)], num_heads=2, head_dim=128, stored=FP8, device=DEVICE)
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()  # ascending
    between = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([between.nextafter(torch.tensor(end)) for end in (-1.0, 1e9)])
    chosen = torch.cat([numbers, between, near, torch.tensor([449.0, 480.0, 1e9])])
    chosen = torch.cat([chosen, -chosen])
    values = torch.zeros(16 * 2 * 128)
    values[: len(chosen)] = chosen
    values = values.view(16, 2, 128).to(DEVICE)
    caches = [KVCache(step.layout(), num_blocks=4, block_size=4) for _ in range(2)]
    (chunk,) = step.chunks()
    chunk = Chunk(0, 0, 16, (), ([0, 1, 2, 3], [0, 1, 2, 3]), chunk.blocks_id)
    triton_backend(step, caches[0])(caches[0], [chunk]).attend(0, values, values, values, 1.0)
    caches[1].write(0, torch.arange(16, device=DEVICE), values, values)
    for ours, exact in zip(caches[0].plane(0), caches[1].plane(0), strict=True):
        assert torch.equal(ours.view(torch.uint8), exact.view(torch.uint8))


def test_one_long_sequence_is_shared_out_and_many_short_ones_are_not() -> None:
    step = PagedStep(spans=[text(300, 301)], num_kv_heads=1)
    plan = KernelPlan.of(step.layout(), step.num_heads, step.dtype, GpuProperties(96 * 1024, 4))
    assert plan.num_splits(1) > 1
    assert plan.num_splits(10_000) == 1
    assert_kernels_equal_reference(step)
    assert_kernels_equal_reference(PagedStep(spans=[text(n, n + 1) for n in range(16)]))
