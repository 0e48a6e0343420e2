"""Turns one matrix into its quantised form. The packages are imported where they are used."""

import logging
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional

from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.quantization.fp8 import Fp8Linear
from gemma_serve.gemma.quantization.kinds import INT4_GROUP_SIZE

_LARGEST_HALF: Final = 32_768.0
"""Half of what float16 holds, which leaves room for what is computed from it."""
_OUTLIER: Final = 6.0  # of Dettmers et al. 2022, who found it in models of all sizes


def quantize_linear(linear: nn.Linear, quantization: Quantization) -> nn.Module:
    """``linear`` as ``quantization`` stores it, on the same device. Its own weight may be gone.

    ``linear``: without a bias, on its device.
    """
    match quantization:
        case "bitsandbytes-8bit":
            return _Float16Range(_bitsandbytes_8bit(linear))
        case "bitsandbytes-4bit":
            return _bitsandbytes_4bit(linear)
        case "torchao-int8" | "torchao-int4":
            return _torchao(linear, quantization)
        case "fp8":
            return Fp8Linear(linear.weight)
        case "none":
            return linear


class _TorchaoLinear(nn.Module):
    """A product with a tensor of torchao's, which looks like any other but cannot all they can."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)


class _Float16Range(nn.Module):
    """Keeps the rows that a product rounds to float16 within its range.

    bitsandbytes' 8-bit product casts what it is given, and Gemma 3's activations overflow that. A
    row that would is divided by what it is too large by, and its product is multiplied again.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        return self.linear.get_parameter("weight")

    def forward(self, hidden: Tensor) -> Tensor:
        excess = (hidden.abs().amax(-1, keepdim=True) / _LARGEST_HALF).clamp(min=1)
        product: Tensor = self.linear(hidden / excess)
        return product * excess


def _bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    # Its only warning says at every product that it casts to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    quantized: nn.Module = bitsandbytes.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=_OUTLIER,
        device="meta",
    )
    # Its parameter would quantise by itself, but only what comes from the CPU.
    rounded, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(linear.weight.detach().half())
    weight = bitsandbytes.nn.Int8Params(rounded, requires_grad=False, CB=rounded, SCB=scale)
    return _filled(quantized, weight)


def _bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    quantized: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        compress_statistics=False,  # a second scale saves 0.4 bits and costs another kernel
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=quantized,
    )
    return _filled(quantized, weight.to(linear.weight.device))


def _filled(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    module.weight = weight
    return module.eval()


def _torchao(linear: nn.Linear, quantization: Quantization) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(linear, _torchao_config(quantization))
    return _TorchaoLinear(linear.get_parameter("weight"))


def _torchao_config(quantization: Quantization) -> Any:
    """torchao is untyped."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    # Without its changes to the compiler's settings, which are the whole process's.
    if quantization == "torchao-int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return Int4WeightOnlyConfig(
        group_size=INT4_GROUP_SIZE,
        int4_packing_format="tile_packed_to_4d",  # torch's own kernel: the others need a package
        set_inductor_config=False,
    )
