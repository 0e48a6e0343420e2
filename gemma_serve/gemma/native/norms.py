"""Norms by our own kernels for CPUs, one call each."""

import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from gemma_serve.gemma.native.library import native_kernels
from gemma_serve.gemma.norms import HeadNorms, Norm, Rotation


class NativeNorm(Norm):
    """``hidden`` is contiguous."""

    def __init__(self, norm: Gemma3RMSNorm) -> None:
        super().__init__(norm)
        self._kernels = native_kernels()

    def __call__(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        output = torch.empty_like(hidden, dtype=dtype)
        self._kernels.norm(output, hidden, self.weight, self.eps)
        return output

    def add(self, hidden: Tensor, branch: Tensor) -> None:
        self._kernels.add_norm(
            None, hidden, branch.contiguous(), self.weight, self.eps, self.weight, self.eps
        )

    def add_and_norm(
        self, hidden: Tensor, branch: Tensor, following: Norm, dtype: torch.dtype
    ) -> Tensor:
        output = torch.empty_like(hidden, dtype=dtype)
        self._kernels.add_norm(
            output,
            hidden,
            branch.contiguous(),
            self.weight,
            self.eps,
            following.weight,
            following.eps,
        )
        return output


class NativeHeadNorms(HeadNorms):
    """Norm, rotation and rounding at once."""

    def __call__(self, heads: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
        num_tokens, _, head_dim = heads.shape
        output = heads.new_empty((num_tokens, len(self.weight), head_dim), dtype=dtype)
        native_kernels().rotate(
            output, heads, self.weight, rotation.cos, rotation.signed_sin, self.eps
        )
        return output
