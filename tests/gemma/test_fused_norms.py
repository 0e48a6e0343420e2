"""Triton's norms compute what torch's do; in Triton's interpreter where there is no GPU.

The interpreter does not round to bfloat16 as a GPU does, so float16 stands for 16 bits.
"""

from collections.abc import Sequence

import pytest
import torch

from gemma_serve.gemma.norms import HeadNorms, Norm, Rotation
from tests.tiny import tiny_text_model

pytest.importorskip("triton", reason="needs the package triton, which comes with torch for CUDA")

# Behind the check, as it imports Triton.
from gemma_serve.gemma.fused_norms import FusedHeadNorms, FusedNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = tiny_text_model().to(DEVICE)  # 32 wide, and its norms are not neutral
LAYER = MODEL.model.layers[0]
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(DEVICE, dtype)


def assert_same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        tolerance = 1e-5 if our.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(our, their, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_rounds_once(dtype: torch.dtype) -> None:
    hidden = random(3, 32)
    norms = (Norm(LAYER.input_layernorm), FusedNorm(LAYER.input_layernorm))
    theirs, ours = (norm(hidden, dtype) for norm in norms)
    assert_same([ours], [theirs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_branch_is_added_normalised_and_the_sum_is_normalised_too(dtype: torch.dtype) -> None:
    branch, hidden = random(3, 32, dtype=dtype), random(3, 32)
    results = []
    for kind in (Norm, FusedNorm):
        after = kind(LAYER.post_attention_layernorm)
        following = kind(LAYER.pre_feedforward_layernorm)
        total = hidden.clone()
        normed = after.add_and_norm(total, branch, following, dtype)
        after.add(total, branch)
        results.append((normed, total))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_are_normalised_and_rotated_and_values_left_out(dtype: torch.dtype) -> None:
    attention = LAYER.self_attn
    rotation = Rotation.of(
        MODEL.model.rotary_emb, torch.tensor([0, 7, 300], device=DEVICE), "sliding_attention"
    )
    heads = random(3, 8, 16, dtype=dtype)
    theirs, ours = (
        kind(attention.q_norm, attention.k_norm, num_heads=4, num_kv_heads=2)(
            heads, rotation, dtype
        )
        for kind in (HeadNorms, FusedHeadNorms)
    )
    assert ours.shape == (3, 6, 16)
    assert_same([ours], [theirs])
