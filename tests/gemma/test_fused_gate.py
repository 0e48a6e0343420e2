"""Triton's gate computes what torch's does; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from gemma_serve.gemma.projections import gelu_gate

pytest.importorskip("triton", reason="needs the package triton, which comes with torch for CUDA")

# Behind the check, as it imports Triton.
from gemma_serve.gemma.fused_gate import fused_gelu_gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("width", [1, 48, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_activated_gate_is_multiplied_and_rounded_once(width: int, dtype: torch.dtype) -> None:
    values = torch.randn(3, 2 * width, generator=torch.Generator().manual_seed(0)) * 4
    gate_up = values.to(DEVICE, dtype)
    ours, exact = fused_gelu_gate(gate_up), gelu_gate(gate_up.double())
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


def test_far_from_zero_it_is_open_or_shut() -> None:
    """Activations of Gemma 3 reach 1e5."""
    gate_up = torch.tensor([[1e5, -1e5, 0.0, 2.0, 2.0, 2.0]], device=DEVICE)
    assert fused_gelu_gate(gate_up).tolist() == [[2e5, 0.0, 0.0]]
