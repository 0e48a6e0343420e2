"""Products with bfloat16 weights by AMX or AVX-512, laid out once in the order in which they are
read."""

from typing import Final

import torch
from torch import Tensor

from gemma_serve.gemma.native.huge_pages import advise_huge_pages
from gemma_serve.gemma.native.library import native_kernels

_TILE: Final = 16
"""Outputs of a tile of weights."""
_DEPTH: Final = 32
"""Inputs of one."""


class TileBlocks:
    """``[num_rows, num_inputs]`` bfloat16 times the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """``weight``: ``[num_outputs, num_inputs]``. Both are such as it takes."""
        assert bias is None
        self._weights = _in_tiles(weight)
        self._num_outputs = len(weight)

    @staticmethod
    def take(weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the machine can multiply so, and ``weight`` can be cut into whole blocks."""
        num_outputs, num_inputs = weight.shape
        is_whole = num_outputs % (2 * _TILE) == 0 and num_inputs % _DEPTH == 0
        return is_whole and bias is None and native_kernels().multiplies

    def __call__(self, hidden: Tensor) -> Tensor:
        return _multiply(hidden, self._weights, self._num_outputs, is_gated=False)


class GatedTileBlocks:
    """``gelu(gate) * up`` of two products with the same rows, rounded once."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        """Weights such as ``TileBlocks`` takes."""
        of_tiles = [weight.view(-1, _TILE, weight.shape[1]) for weight in (gate, up)]
        self._weights = _in_tiles(torch.stack(of_tiles, dim=1).view(-1, gate.shape[1]))
        self._num_outputs = len(gate)

    def __call__(self, hidden: Tensor) -> Tensor:
        return _multiply(hidden, self._weights, self._num_outputs, is_gated=True)


def _multiply(hidden: Tensor, weights: Tensor, num_outputs: int, *, is_gated: bool) -> Tensor:
    output = hidden.new_empty((hidden.shape[0], num_outputs))
    native_kernels().multiply(output, hidden.contiguous(), weights, is_gated=is_gated)
    return output


def _in_tiles(weight: Tensor) -> Tensor:
    """``[num_blocks, num_tiles, tile, pair of inputs, output, 2]``, as ``products.h`` has it."""
    num_inputs = weight.shape[1]
    rows = weight.view(-1, 2, _TILE, num_inputs // _DEPTH, _DEPTH // 2, 2)
    tiles = rows.permute(0, 3, 1, 4, 2, 5)
    packed = torch.empty(tiles.shape, dtype=torch.bfloat16)
    advise_huge_pages(packed)
    return packed.copy_(tiles)
