"""The activation between the feed-forward products, in one launch. Imported where Triton is."""

from typing import Final

import torch
from torch import Tensor

from gemma_serve.gemma.launching import launching_on
from gemma_serve.gemma.triton_gate import gelu_gate_kernel

_BLOCK: Final = 1024
"""Columns of one program: eight for each of its threads, 16 bytes of bfloat16."""


def fused_gelu_gate(gate_up: Tensor) -> Tensor:
    """As ``projections.gelu_gate``, rounded once. ``gate_up``: contiguous."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    with launching_on(gate_up.device):
        gelu_gate_kernel[(num_rows, -(-width // _BLOCK))](
            output, gate_up, WIDTH=width, BLOCK=_BLOCK
        )
    return output
