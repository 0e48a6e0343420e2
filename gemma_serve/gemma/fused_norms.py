"""Norms by Triton's kernels, one launch each. Imported only where Triton is there."""

import torch
from torch import Tensor

from gemma_serve.gemma.launching import launching_on, padded
from gemma_serve.gemma.norms import HeadNorms, Norm, Rotation
from gemma_serve.gemma.triton_norms import add_norm_kernel, norm_kernel, rotate_kernel


class FusedNorm(Norm):
    """Takes contiguous tensors."""

    def __call__(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        output = torch.empty_like(hidden, dtype=dtype)
        num_rows, width = hidden.shape
        with launching_on(hidden.device):
            norm_kernel[(num_rows,)](
                output, hidden, self.weight, self.eps, WIDTH=width, PADDED_WIDTH=padded(width)
            )
        return output

    def add(self, hidden: Tensor, branch: Tensor) -> None:
        self._add(hidden, hidden, branch, None)

    def add_and_norm(
        self, hidden: Tensor, branch: Tensor, following: Norm, dtype: torch.dtype
    ) -> Tensor:
        output = torch.empty_like(hidden, dtype=dtype)
        self._add(output, hidden, branch, following)
        return output

    def _add(self, output: Tensor, hidden: Tensor, branch: Tensor, following: Norm | None) -> None:
        num_rows, width = hidden.shape
        next_norm = following or self
        with launching_on(hidden.device):
            add_norm_kernel[(num_rows,)](
                output,
                hidden,
                branch.contiguous(),
                self.weight,
                next_norm.weight,
                self.eps,
                next_norm.eps,
                WIDTH=width,
                PADDED_WIDTH=padded(width),
                HAS_NEXT=following is not None,
            )


class FusedHeadNorms(HeadNorms):
    """Norm, rotation and rounding at once."""

    def __call__(self, heads: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
        num_tokens, _, head_dim = heads.shape
        num_heads = len(self.weight)
        output = heads.new_empty((num_tokens, num_heads, head_dim), dtype=dtype)
        with launching_on(heads.device):
            rotate_kernel[(num_tokens, num_heads)](
                output,
                heads,
                self.weight,
                rotation.cos,
                rotation.signed_sin,
                heads.stride(0),
                self.eps,
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
            )
        return output
