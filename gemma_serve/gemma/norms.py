"""Norms of the decoder layers, and what stands beside them: sums, rotations and rounding.

Two kinds compute the same: torch's operations, and Triton's kernels, which do at once what torch
needs several operations for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding

from gemma_serve.gemma.launching import Kernels


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of the step's positions: ``[num_tokens, 1, head_dim]`` float32 each.

    ``signed_sin`` is negative in its first half, so that halves only have to be swapped.
    """

    cos: Tensor
    signed_sin: Tensor

    @classmethod
    def of(cls, rotary: Gemma3RotaryEmbedding, positions: Tensor, layer_type: str) -> "Rotation":
        cos, sin = rotary(positions.float(), positions[None], layer_type)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        return cls(cos[0].unsqueeze(1), signed_sin.unsqueeze(1))

    def to(self, device: torch.device) -> "Rotation":
        return Rotation(self.cos.to(device), self.signed_sin.to(device))

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate ``[num_tokens, num_heads, head_dim]``."""
        swapped = heads.roll(heads.shape[-1] // 2, -1)
        return torch.addcmul(heads * self.cos, swapped, self.signed_sin)


class Norm:
    """Root mean square norm whose weight counts from one (Zhang and Sennrich 2019; Gemma).

    ``hidden`` is ``[num_tokens, width]`` float32 throughout.
    """

    def __init__(self, norm: Gemma3RMSNorm) -> None:
        self.weight = 1.0 + norm.weight.float()
        self.eps: float = norm.eps

    def __call__(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """``hidden`` normalised, rounded to ``dtype``."""
        return self._of(hidden).to(dtype)

    def add(self, hidden: Tensor, branch: Tensor) -> None:
        """Add ``branch`` to ``hidden``, normalised."""
        hidden += self._of(branch.float())

    def add_and_norm(
        self, hidden: Tensor, branch: Tensor, following: "Norm", dtype: torch.dtype
    ) -> Tensor:
        """Both: ``add``, and what ``following`` makes of the sum."""
        self.add(hidden, branch)
        return following(hidden, dtype)

    def _of(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class HeadNorms:
    """The norms of queries and keys, which stand side by side, and their rotation."""

    def __init__(
        self, q_norm: Gemma3RMSNorm, k_norm: Gemma3RMSNorm, *, num_heads: int, num_kv_heads: int
    ) -> None:
        queries = (1.0 + q_norm.weight.float()).expand(num_heads, -1)
        keys = (1.0 + k_norm.weight.float()).expand(num_kv_heads, -1)
        self.weight = torch.cat((queries, keys))  # [num_heads + num_kv_heads, head_dim]
        self.eps: float = q_norm.eps

    def __call__(self, heads: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
        """The first heads of ``[num_tokens, more heads, head_dim]``, normalised and rotated."""
        heads = heads[:, : len(self.weight)].float()
        normed = functional.rms_norm(heads, heads.shape[-1:], None, self.eps).mul_(self.weight)
        return rotation.apply(normed).to(dtype)


def norm_classes(kernels: Kernels) -> tuple[Callable[[Gemma3RMSNorm], Norm], type[HeadNorms]]:
    """What computes norms, and those of heads."""
    if kernels == "torch":
        return Norm, HeadNorms
    if kernels == "native":
        # They build on this module.
        from gemma_serve.gemma.native.norms import NativeHeadNorms, NativeNorm

        return NativeNorm, NativeHeadNorms
    # Not everybody has Triton.
    from gemma_serve.gemma.fused_norms import FusedHeadNorms, FusedNorm

    return FusedNorm, FusedHeadNorms
