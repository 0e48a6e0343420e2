"""Quantises a checkpoint's matrices one by one while transformers loads them.

So neither the GPU nor the machine ever holds the whole model as it was. What transformers has for
this itself (``quantization_config``) knows which modules to leave out by patterns of names, and its
float8 fetches kernels from the Hub.
"""

from typing import Any, Final

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.quantization.linears import quantize_linear
from gemma_serve.gemma.quantization.matrices import quantized_names

_METHOD: Final = "gemma-serve"


@register_quantization_config(_METHOD)
class StreamingQuantization(QuantizationConfigMixin):  # type: ignore[misc]  # transformers
    """What ``from_pretrained`` is to do with the weights, as its ``quantization_config``."""

    def __init__(self, quantization: Quantization) -> None:
        self.quant_method = _METHOD
        self.quantization = quantization


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers
    """transformers asks it about every weight that it has read."""

    quantization_config: StreamingQuantization

    def _process_model_before_weight_loading(self, model: Gemma3Model, **_: object) -> None:
        self._names = {f"{name}.weight" for name in quantized_names(model)}

    def param_needs_quantization(self, _model: Gemma3Model, param_name: str, **_: object) -> bool:
        return param_name in self._names

    def get_quantize_ops(self) -> "_Quantize":
        return _Quantize(self.quantization_config.quantization)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantize(ConversionOps):  # type: ignore[misc]  # transformers
    def __init__(self, quantization: Quantization) -> None:
        self._quantization = quantization

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: Gemma3Model,
        missing_keys: set[str],
        **_: object,
    ) -> dict[str, torch.Tensor]:
        """Put the one weight of ``input_dict`` into ``model``; nothing is left to be put there."""
        (values,) = input_dict.values()
        weight = values[0] if isinstance(values, list) else values
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantized = quantize_linear(linear, self._quantization)
        for module in quantized.modules():
            # Or transformers would make weights up for it.
            setattr(module, "_is_hf_initialized", True)  # noqa: B010
        model.set_submodule(name, quantized)
        missing_keys.discard(full_layer_name)
        return {}
