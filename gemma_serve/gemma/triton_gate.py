"""The activation between the feed-forward products as one Triton kernel.

Imported only where Triton is there. Not measured on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def gelu_gate_kernel(output, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program computes ``BLOCK`` columns of one row of ``output``, ``WIDTH`` wide.

    A row of ``gate_up`` has the gate first, then what is gated.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=there, other=0.0).to(tl.float32)
    # (1 + tanh(x)) / 2 is sigmoid(2 x), with x = sqrt(2 / pi) (gate + 0.044715 gate**3).
    scaled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    decayed = tl.exp(-tl.abs(scaled))  # of a positive number it could overflow
    result = gate * (tl.where(scaled >= 0.0, 1.0, decayed) / (1.0 + decayed)) * up
    tl.store(output + row * WIDTH + column, result.to(output.dtype.element_ty), mask=there)
