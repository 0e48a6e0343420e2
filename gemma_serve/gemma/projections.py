"""Matrix products with weights that were laid out for this machine once.

On a CPU, oneDNN reads bfloat16 weights about 1.5 times faster from blocks of its own than from the
rows that a checkpoint has, and can apply an activation before it rounds. The blocks take the place
of the rows, so that memory does not double. Everything else multiplies as torch does.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

Projection = Callable[[Tensor], Tensor]
"""``[num_tokens, in_features]`` to ``[num_tokens, out_features]``."""

_ROWS_HINT = 8
"""Rows that oneDNN lays blocks out for. From 1 to 32 it chooses the same."""


def projection(*modules: nn.Module) -> Projection:
    """One product in place of those of ``modules``, whose outputs stand side by side.

    Afterwards ``modules`` share their weights with it, or have none if they were packed.
    """
    linears = [module for module in modules if type(module) is nn.Linear]
    if len(linears) < len(modules):  # quantised ones multiply as they know best
        return _Beside(modules)
    weight = linears[0].weight if len(linears) == 1 else torch.cat([m.weight for m in linears])
    bias = _joined_bias(linears)
    if _packs(weight):
        _release(linears)
        return _Packed(weight, bias)
    if len(linears) > 1:
        _share(linears, weight)
    return _Plain(weight, bias)


def feed_forward(mlp: Gemma3MLP) -> Projection:
    """``down(gelu(gate(x)) * up(x))``; afterwards ``mlp`` is as in ``projection``."""
    linears = (mlp.gate_proj, mlp.up_proj)
    if all(type(linear) is nn.Linear and _packs(linear.weight) for linear in linears):
        return _PackedFeedForward(mlp)
    return _PlainFeedForward(mlp)


def output_projection(lm_head: nn.Linear) -> Projection:
    """The product with the vocabulary. Its weight is the embedding's too, so it stays."""
    if type(lm_head) is nn.Linear and _packs(lm_head.weight):
        return _Packed(lm_head.weight, lm_head.bias)
    return lm_head


def _packs(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def _release(linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)


def _share(linears: Sequence[nn.Linear], weight: Tensor) -> None:
    parts = torch.split(weight, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)


class _Plain:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight, self._bias)


class _Packed:
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: str = "none",
        algorithm: str = "",
    ) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        self._activation = activation
        self._algorithm = algorithm

    def __call__(self, hidden: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._weight, self._bias, self._activation, [], self._algorithm
        )
        return product

    def times(self, hidden: Tensor, factor: Tensor) -> Tensor:
        """The product, each element multiplied by ``factor``'s."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            hidden, factor, self._weight, self._bias, "mul"
        )
        return product


class _Beside:
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.cat([module(hidden) for module in self._modules], dim=-1)


class _PackedFeedForward:
    def __init__(self, mlp: Gemma3MLP) -> None:
        self._gate = _Packed(mlp.gate_proj.weight, mlp.gate_proj.bias, "gelu", "tanh")
        self._up = _Packed(mlp.up_proj.weight, mlp.up_proj.bias)
        _release((mlp.gate_proj, mlp.up_proj))
        self._down = projection(mlp.down_proj)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._down(self._up.times(hidden, self._gate(hidden)))


class _PlainFeedForward:
    def __init__(self, mlp: Gemma3MLP) -> None:
        self._gate_up = projection(mlp.gate_proj, mlp.up_proj)
        self._down = projection(mlp.down_proj)

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        return self._down(functional.gelu(gate, approximate="tanh") * up)
