"""Matrix products in 8-bit floating point, with torch alone."""

from typing import Final, Self

import torch
from torch import Tensor, nn

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = torch.finfo(FP8).max  # 448
_SMALLEST_SCALE: Final = 1e-12


class Fp8Linear(nn.Module):
    """Both factors in float8, each row with a scale of its own; accumulated in float32.

    Weights are rounded once and activations in every product. ``in_features`` and ``out_features``
    must be multiples of 16, as all of Gemma 3 are.
    """

    def __init__(self, weight: Tensor) -> None:
        """``weight``: ``[out_features, in_features]``, in any floating-point format."""
        super().__init__()
        rounded, scale = _rounded(weight.detach())
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # [out_features, 1] float32

    @classmethod
    def joined(cls, linears: list[Self]) -> Self:
        """One product in place of those of ``linears``, whose outputs stand side by side.

        Afterwards they share their weights with it.
        """
        whole = cls.__new__(cls)
        nn.Module.__init__(whole)
        # As bytes: torch copies float8, but joins it on some devices only.
        parts = [linear.weight.view(torch.uint8) for linear in linears]
        weight = torch.cat(parts).view(FP8)
        whole.weight = nn.Parameter(weight, requires_grad=False)
        whole.scale = nn.Parameter(torch.cat([li.scale for li in linears]), requires_grad=False)
        sizes = [len(part) for part in parts]
        for linear, part in zip(linears, torch.split(weight, sizes), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
        return whole

    def forward(self, hidden: Tensor) -> Tensor:
        """``[num_tokens, in_features]`` to ``[num_tokens, out_features]``, rounded to bfloat16."""
        rounded, scale = _rounded(hidden)
        product: Tensor = torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            out_dtype=torch.bfloat16,
        )
        return product.to(hidden.dtype)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[num_rows, size]`` in float8, and each row's scale ``[num_rows, 1]`` float32."""
    scale = (rows.abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp(min=_SMALLEST_SCALE)
    return (rows.float() / scale).to(FP8), scale
