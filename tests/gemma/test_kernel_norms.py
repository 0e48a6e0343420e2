"""Norms by kernels of ours compute what torch's do; Triton's in its interpreter without a GPU.

The interpreter does not round to bfloat16 as a GPU does, so float16 stands for 16 bits there.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch

from gemma_serve.gemma.launching import Kernels
from gemma_serve.gemma.norms import Rotation, norm_classes
from tests.gemma.native_kernels import needs_kernels
from tests.tiny import tiny_text_model

MODEL = tiny_text_model()  # 32 wide, and its norms are not neutral
GENERATOR = torch.Generator().manual_seed(0)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
KINDS = [
    pytest.param("native", torch.float32, marks=needs_kernels),
    pytest.param("native", torch.bfloat16, marks=needs_kernels),
    pytest.param("triton", torch.float32, marks=needs_triton),
    pytest.param("triton", torch.float16, marks=needs_triton),
]

pytestmark = pytest.mark.parametrize(("kernels", "dtype"), KINDS)


def device_of(kernels: Kernels) -> torch.device:
    """Moves the model there."""
    on_gpu = kernels == "triton" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    MODEL.to(device)
    return device


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def assert_same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[our.dtype]
        torch.testing.assert_close(our, their, atol=tolerance, rtol=tolerance)


def test_a_norm_rounds_once(kernels: Kernels, dtype: torch.dtype) -> None:
    hidden = random(3, 32).to(device_of(kernels))
    theirs, ours = (
        norm_classes(kind)[0](MODEL.model.layers[0].input_layernorm)(hidden, dtype)
        for kind in ("torch", kernels)
    )
    assert_same([ours], [theirs])


def test_a_branch_is_added_normalised_and_the_sum_is_normalised_too(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    device = device_of(kernels)
    layer = MODEL.model.layers[0]
    branch, hidden = random(3, 32).to(device, dtype), random(3, 32).to(device)
    results = []
    for kind in ("torch", kernels):
        norm, _ = norm_classes(kind)
        after, following = norm(layer.post_attention_layernorm), norm(layer.input_layernorm)
        total = hidden.clone()
        normed = after.add_and_norm(total, branch, following, dtype)
        after.add(total, branch)
        results.append((normed, total))
    assert_same(*results)


def test_heads_are_normalised_and_rotated_and_values_left_out(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    device = device_of(kernels)
    attention = MODEL.model.layers[0].self_attn
    positions = torch.tensor([0, 7, 300], device=device)
    rotation = Rotation.of(MODEL.model.rotary_emb, positions, "sliding_attention")
    heads = random(3, 8, 16).to(device, dtype)
    theirs, ours = (
        norm_classes(kind)[1](attention.q_norm, attention.k_norm, num_heads=4, num_kv_heads=2)(
            heads, rotation, dtype
        )
        for kind in ("torch", kernels)
    )
    assert ours.shape == (3, 6, 16)
    assert_same([ours], [theirs])
