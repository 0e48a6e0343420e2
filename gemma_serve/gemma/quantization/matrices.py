"""Which of a model's matrices are quantised, and how large they are then.

The decoder layers' matrices, nine tenths of 27B. What is small or delicate stays as it is: norms,
the vision tower and its projector (vllm#42813), and the embedding, which is also the output head.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from gemma_serve.gemma.checkpoints import DUMMY_SIZES
from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.dummy import AnyGemma3Config, Gemma3Model, dummy_config, empty_model
from gemma_serve.gemma.quantization.kinds import KINDS

_GIB: Final = 1024**3
_SHARE_FOR_WEIGHTS: Final = 0.85
"""Of free memory; the rest is for keys, values and what a step computes."""


def quantized_names(model: Gemma3Model) -> list[str]:
    """Names of the modules in ``model`` whose weights are quantised."""
    layers: nn.Module = model.get_decoder().layers
    of_layers = {id(module) for module in layers.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in of_layers and type(module) is nn.Linear and module.bias is None
    ]


def quantized_shapes(
    config: AnyGemma3Config, dtype: torch.dtype, quantization: Quantization
) -> Gemma3Model:
    """A model on the meta device, whose parameters have the sizes that loaded ones will have."""
    model = empty_model(config, dtype=dtype, device=torch.device("meta"))
    return model if quantization == "none" else _shrunk(model, KINDS[quantization].num_bytes)


def shapes_of_size(config: AnyGemma3Config, dtype: torch.dtype, num_bytes: int) -> Gemma3Model:
    """The same for weights of another kind, which are of ``num_bytes`` all together."""
    model = empty_model(config, dtype=dtype, device=torch.device("meta"))
    matrices = [model.get_submodule(name).weight for name in quantized_names(model)]
    others = stored_bytes(model) - stored_bytes(nn.ParameterList(matrices))
    num_weights = sum(matrix.numel() for matrix in matrices)
    bytes_per_weight = max(0, num_bytes - others) / num_weights
    return _shrunk(model, lambda rows, columns: math.ceil(rows * columns * bytes_per_weight))


def _shrunk(model: Gemma3Model, num_bytes: Callable[[int, int], int]) -> Gemma3Model:
    for name in quantized_names(model):
        linear = model.get_submodule(name)
        size = num_bytes(linear.out_features, linear.in_features)
        stored = torch.empty(size, dtype=torch.uint8, device="meta")
        linear.weight = nn.Parameter(stored, requires_grad=False)
    return model


def what_fits(config: AnyGemma3Config, free_bytes: int) -> str:
    """For who has chosen too much: the kinds of weights, and the sizes of Gemma 3, that fit."""
    room = free_bytes * _SHARE_FOR_WEIGHTS
    kinds: dict[str, int] = {
        kind: stored_bytes(quantized_shapes(config, torch.bfloat16, kind)) for kind in KINDS
    }
    sizes: dict[str, int] = {
        size: stored_bytes(quantized_shapes(dummy_config(size), torch.bfloat16, "none"))
        for size in DUMMY_SIZES
    }
    choices = []
    if fitting := _named(kinds, room):
        choices.append(f"with quantization: {fitting}")
    if fitting := _named(sizes, room):
        choices.append(f"in bfloat16 with a smaller size: {fitting}")
    return f"it would fit {'; or '.join(choices)}" if choices else "no size of Gemma 3 fits"


def _named(bytes_of: Mapping[str, int], room: float) -> str:
    fitting = (f"{name} ({n / _GIB:.1f} GiB)" for name, n in bytes_of.items() if n <= room)
    return ", ".join(fitting)


def stored_bytes(model: nn.Module) -> int:
    """Memory of the weights, with the scales of quantised ones."""
    return sum(_parts_bytes(parameter) for parameter in model.parameters())


def _parts_bytes(parameter: Tensor) -> int:
    return sum(part.nbytes for part in _parts(parameter))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, which claim the size before
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    # bitsandbytes keeps scales beside its weights, of 4 and of 8 bits.
    for scale in (
        getattr(getattr(tensor, "quant_state", None), "absmax", None),
        _row_scale(tensor),
    ):
        if scale is not None:
            yield scale


def _row_scale(tensor: Tensor) -> Tensor | None:
    scale: Tensor | None = getattr(tensor, "SCB", None)
    return scale
