"""Norms, residual sums and rotations as Triton kernels, one for what torch needs several for.

Imported only where Triton is there. A decode step has hundreds of them on a few kilobytes each, and
each operation costs a GPU some microseconds whatever it computes. Not measured on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(output, hidden, weight, eps, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    """One program normalises one row of ``hidden``, float32, into ``output``."""
    column = tl.arange(0, PADDED_WIDTH)
    there = column < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    values = tl.load(hidden + row + column, mask=there, other=0.0)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    result = values * scale * tl.load(weight + column, mask=there, other=0.0)
    tl.store(output + row + column, result.to(output.dtype.element_ty), mask=there)


@triton.jit
def add_norm_kernel(
    output,
    hidden,
    branch,
    weight,
    next_weight,
    eps,
    next_eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    HAS_NEXT: tl.constexpr,
):
    """One program adds one row of ``branch``, normalised, to ``hidden``.

    ``HAS_NEXT``: and normalises the sum into ``output``, by other weights.
    """
    column = tl.arange(0, PADDED_WIDTH)
    there = column < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    values = tl.load(branch + row + column, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    values = values * scale * tl.load(weight + column, mask=there, other=0.0)
    values += tl.load(hidden + row + column, mask=there, other=0.0)
    tl.store(hidden + row + column, values, mask=there)
    if HAS_NEXT:
        scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + next_eps)
        result = values * scale * tl.load(next_weight + column, mask=there, other=0.0)
        tl.store(output + row + column, result.to(output.dtype.element_ty), mask=there)


@triton.jit
def rotate_kernel(
    output,
    heads,
    weight,
    cos,
    signed_sin,
    token_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program normalises and rotates one head of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, HEAD_DIM)
    swapped_dim = (dim + HEAD_DIM // 2) % HEAD_DIM
    source = heads + token * token_stride + head * HEAD_DIM
    values = tl.load(source + dim).to(tl.float32)
    swapped = tl.load(source + swapped_dim).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HEAD_DIM + eps)
    values = values * scale * tl.load(weight + head * HEAD_DIM + dim)
    swapped = swapped * scale * tl.load(weight + head * HEAD_DIM + swapped_dim)
    result = values * tl.load(cos + token * HEAD_DIM + dim)
    result += swapped * tl.load(signed_sin + token * HEAD_DIM + dim)
    place = (token * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(output + place, result.to(output.dtype.element_ty))
