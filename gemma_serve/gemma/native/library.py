"""The kernels as functions of tensors.

Tensors lie on the CPU and are contiguous, except that rows of heads may stand apart. Activations
are bfloat16 or float32, and the cache stores the same or bfloat16; everything else is float32 but
for what is counted, which is int64.
"""

from collections.abc import Callable
from ctypes import CDLL, Structure, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from gemma_serve.gemma.native.build import load_library

MAX_HEAD_DIM: Final = 512  # as in numbers.h
HEAD_DIM_MULTIPLE: Final = 16  # lanes of the widest machine


class _PagesStruct(Structure):
    _fields_ = [  # as ctypes has it
        ("table", c_void_p),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("positions", c_void_p),
        ("key_ends", c_void_p),
        ("seats", c_void_p),
        ("window", c_int64),
    ]


class Pages:
    """Where the keys and values of some layers lie, and what the step's tokens see of them."""

    def __init__(
        self,
        table: Tensor,
        block_size: int,
        *,
        positions: Tensor,
        key_ends: Tensor,
        seats: Tensor,
        window: int | None,
    ) -> None:
        """``table``: ``[num_seats, max_blocks]`` int32. The others are as in ``StepTokens``."""
        self._tensors = (table, positions, key_ends, seats)  # must live as long as their addresses
        self.num_tokens = len(positions)
        self.address = byref(
            _PagesStruct(
                table.data_ptr(),
                table.shape[1],
                block_size,
                positions.data_ptr(),
                key_ends.data_ptr(),
                seats.data_ptr(),
                window or 0,
            )
        )


class NativeKernels:
    """Raises ``BuildError`` where they cannot be had."""

    def __init__(self) -> None:
        library = load_library()
        self._norm = _function(library, "norm", *[c_void_p] * 3, c_float, *[c_int64] * 2, c_int)
        self._add_norm = _function(
            library, "add_norm", *[c_void_p] * 5, *[c_float] * 2, *[c_int64] * 2, c_int
        )
        self._rotate = _function(library, "rotate", *[c_void_p] * 5, c_float, *[c_int64] * 4, c_int)
        self._write_kv = _function(
            library, "write_kv", *[c_void_p] * 5, *[c_int64] * 4, *[c_int] * 2
        )
        self._attend = _function(
            library, "attend", *[c_void_p] * 6, *[c_int64] * 5, c_float, *[c_int] * 2
        )
        by_tiles = bool(library["has_tiles"]())  # AMX, and a system that lets programs use it
        self._multiply = _function(
            library,
            "multiply_tiles" if by_tiles else "multiply_by_vectors",
            *[c_void_p] * 3,
            *[c_int64] * 3,
            c_int,
        )
        self.multiplies = by_tiles or bool(library["has_bfloat16_vectors"]())
        """Whether the machine has AMX or AVX-512 BF16, for ``multiply``."""

    def norm(self, output: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> None:
        """``hidden`` ``[num_rows, width]`` normalised, into ``output``."""
        num_rows, width = hidden.shape
        self._norm(
            output.data_ptr(),
            hidden.data_ptr(),
            weight.data_ptr(),
            eps,
            num_rows,
            width,
            _is_bfloat16(output),
        )

    def add_norm(
        self,
        output: Tensor | None,
        hidden: Tensor,
        branch: Tensor,
        weight: Tensor,
        eps: float,
        next_weight: Tensor,
        next_eps: float,
    ) -> None:
        """Add ``branch``, normalised by ``weight``, to ``hidden``; into ``output``, if there is
        one, what ``next_weight`` makes of the sum."""
        assert output is None or output.dtype == branch.dtype
        num_rows, width = hidden.shape
        self._add_norm(
            None if output is None else output.data_ptr(),
            hidden.data_ptr(),
            branch.data_ptr(),
            weight.data_ptr(),
            next_weight.data_ptr(),
            eps,
            next_eps,
            num_rows,
            width,
            _is_bfloat16(branch),
        )

    def rotate(
        self,
        output: Tensor,
        heads: Tensor,
        weight: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        eps: float,
    ) -> None:
        """The first of ``heads`` ``[num_tokens, more heads, head_dim]``, normalised and rotated,
        into ``output`` ``[num_tokens, num_heads, head_dim]``."""
        assert output.dtype == heads.dtype
        num_tokens, num_heads, head_dim = output.shape
        self._rotate(
            output.data_ptr(),
            heads.data_ptr(),
            weight.data_ptr(),
            cos.data_ptr(),
            signed_sin.data_ptr(),
            eps,
            num_tokens,
            heads.stride(0),
            num_heads,
            head_dim,
            _is_bfloat16(output),
        )

    def write_kv(
        self, pages: Pages, key_plane: Tensor, value_plane: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store ``key`` and ``value`` ``[num_tokens, num_kv_heads, head_dim]`` of the step."""
        assert key.dtype == value.dtype
        self._write_kv(
            pages.address,
            key_plane.data_ptr(),
            value_plane.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            pages.num_tokens,
            key.stride(0),
            value.stride(0),
            key_plane.shape[1],
            _is_bfloat16(key),
            _is_bfloat16(key_plane),
        )

    def attend(
        self,
        pages: Pages,
        output: Tensor,
        query: Tensor,
        key_plane: Tensor,
        value_plane: Tensor,
        rows: Tensor,
        scale: float,
    ) -> None:
        """Attention of the tokens in ``rows`` of ``query`` ``[num_tokens, num_heads, head_dim]``,
        into the same rows of ``output``."""
        _, num_heads, head_dim = query.shape
        self._attend(
            pages.address,
            output.data_ptr(),
            query.data_ptr(),
            key_plane.data_ptr(),
            value_plane.data_ptr(),
            rows.data_ptr(),
            rows.shape[0],
            query.stride(0),
            num_heads,
            key_plane.shape[1] // head_dim,
            head_dim,
            scale,
            _is_bfloat16(query),
            _is_bfloat16(key_plane),
        )

    def multiply(
        self, output: Tensor, activations: Tensor, weights: Tensor, *, is_gated: bool
    ) -> None:
        """``activations`` ``[num_rows, num_inputs]`` times ``weights``, as ``products`` lays them
        out; all bfloat16. ``is_gated``: ``gelu(gate) * up`` of what they give."""
        num_rows, num_inputs = activations.shape
        self._multiply(
            output.data_ptr(),
            activations.data_ptr(),
            weights.data_ptr(),
            num_rows,
            num_inputs,
            weights.shape[0],
            is_gated,
        )


def _function(library: CDLL, name: str, *arguments: Any) -> Callable[..., None]:
    function = library[name]
    function.argtypes = arguments
    function.restype = None
    return function


@cache
def native_kernels() -> NativeKernels:
    """Those of this machine. Raises ``BuildError``."""
    return NativeKernels()


def _is_bfloat16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
