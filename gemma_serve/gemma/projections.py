"""Matrix products with weights that were laid out for this machine once.

On a CPU, bfloat16 weights are packed. One that has bfloat16 arithmetic gets oneDNN's blocks, which
it reads about 1.5 times faster than the rows that a checkpoint has, and which can apply an
activation before they round; an x86 with a compiler gets tiles of our own, which are read another
1.2 to 1.3 times faster. An x86 without (before AVX-512 BF16) would emulate it, many times
slower; it gets FBGEMM's blocks of float16 *weights*, which are multiplied with float32 activations.
The blocks take the place of the rows, so that memory does not double. Everything else multiplies as
torch does.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.launching import Kernels
from gemma_serve.gemma.native.products import GatedTileBlocks, TileBlocks
from gemma_serve.gemma.quantization.fp8 import Fp8Linear

Projection = Callable[[Tensor], Tensor]
"""``[num_tokens, in_features]`` to ``[num_tokens, out_features]``."""

_ROWS_HINT: Final = 8
"""Rows that oneDNN lays blocks out for. From 1 to 32 it chooses the same."""

_MAX_HALF: Final = torch.finfo(torch.float16).max
_MAX_PART_BYTES: Final = 10 * 1024**2
"""Weights that are multiplied at once, where caches matter: a part of a usual L3 cache."""


def activation_dtype(weights_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products with such weights take, and what attention had better compute in."""
    return torch.float32 if _packs_halves(weights_dtype, device) else weights_dtype


def projection(*modules: nn.Module, kernels: Kernels = "torch") -> Projection:
    """One product in place of those of ``modules``, whose outputs stand side by side.

    Afterwards ``modules`` share their weights with it, or have none if they were packed.
    """
    linears = [module for module in modules if _is_plain(module)]
    if len(linears) < len(modules):  # quantised ones multiply as they know best
        fp8 = [module for module in modules if isinstance(module, Fp8Linear)]
        return Fp8Linear.joined(fp8) if len(fp8) == len(modules) else _Beside(modules)
    weight = linears[0].weight if len(linears) == 1 else torch.cat([m.weight for m in linears])
    bias = _joined_bias(linears)
    if (blocks := _blocks_for(weight, bias, kernels)) is not None:
        _release(linears)
        return blocks(weight, bias)
    if len(linears) > 1:
        _share(linears, weight)
    return _Plain(weight, bias)


def feed_forward(mlp: Gemma3MLP, kernels: Kernels = "torch") -> Projection:
    """``down(gelu(gate(x)) * up(x))``; afterwards ``mlp`` is as in ``projection``."""
    gated = _gated(mlp, kernels)
    down = projection(mlp.down_proj, kernels=kernels)
    return lambda hidden: down(gated(hidden))


def _gated(mlp: Gemma3MLP, kernels: Kernels) -> Projection:
    """``gelu(gate(x)) * up(x)``"""
    linears = (mlp.gate_proj, mlp.up_proj)
    if all(_is_plain(linear) for linear in linears):
        blocks = {_blocks_for(linear.weight, linear.bias, kernels) for linear in linears}
        if blocks == {TileBlocks}:
            gated = GatedTileBlocks(mlp.gate_proj.weight, mlp.up_proj.weight)
            _release(linears)
            return gated
        if blocks == {OneDnnBlocks}:
            return _GatedOneDnnBlocks(*linears)
    gate_up, gate = projection(*linears, kernels=kernels), _gelu_gate_by(kernels)
    return lambda hidden: gate(gate_up(hidden))


def gelu_gate(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` of ``[num_tokens, 2 * size]``, in which ``gate`` and ``up`` stand side by
    side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def _gelu_gate_by(kernels: Kernels) -> Callable[[Tensor], Tensor]:
    if kernels != "triton":
        return gelu_gate
    # Not everybody has Triton.
    from gemma_serve.gemma.fused_gate import fused_gelu_gate

    return fused_gelu_gate


def output_projection(lm_head: nn.Linear, kernels: Kernels = "torch") -> Projection:
    """The product with the vocabulary. Its weight is the embedding's too, so it stays."""
    if _is_plain(lm_head):
        blocks = _blocks_for(lm_head.weight, lm_head.bias, kernels)
        if blocks is not None:
            return blocks(lm_head.weight, lm_head.bias)
    return lm_head


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    # Quantised checkpoints also have torch's own modules around tensors that are not torch's.
    return type(module) is nn.Linear and type(module.weight.data) is Tensor


class _Blocks(Protocol):
    def __call__(self, weight: Tensor, bias: Tensor | None) -> Projection: ...


def _blocks_for(weight: Tensor, bias: Tensor | None, kernels: Kernels) -> _Blocks | None:
    """How to pack ``weight``; ``None`` to leave it as it is."""
    if _packs_bfloat16(weight.dtype, weight.device):
        is_tiled = kernels == "native" and TileBlocks.take(weight, bias)
        return TileBlocks if is_tiled else OneDnnBlocks
    if _packs_halves(weight.dtype, weight.device):
        return HalfBlocks
    return None


def _packs_bfloat16(dtype: torch.dtype, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _packs_halves(dtype: torch.dtype, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and not _packs_bfloat16(dtype, device)
        and "fbgemm" in torch.backends.quantized.supported_engines
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


class OneDnnBlocks:
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


class HalfBlocks:
    """Float16 holds what bfloat16 does to a part in 2**25, but for numbers that no weight has.

    FBGEMM reads all of the weights again for every few rows of activations, so they are cut into
    parts that a cache holds: 32 rows with a large vocabulary take two thirds of the time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.abs().max() > _MAX_HALF:
            raise CheckpointError(
                f"a weight is larger than {_MAX_HALF:g}, so the file is damaged: copy or download "
                "it again"
            )
        num_outputs = max(1, _MAX_PART_BYTES // (torch.float16.itemsize * weight.shape[1]))
        weights = torch.split(weight, num_outputs)
        biases: Sequence[Tensor | None] = (
            [None] * len(weights) if bias is None else torch.split(bias.float(), num_outputs)
        )
        self._parts: list[Any] = [
            torch.ops.quantized.linear_prepack_fp16(part.float(), part_bias)
            for part, part_bias in zip(weights, biases, strict=True)
        ]

    def __call__(self, hidden: Tensor) -> Tensor:
        products = [torch.ops.quantized.linear_dynamic_fp16(hidden, part) for part in self._parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class _Beside:
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.cat([module(hidden) for module in self._modules], dim=-1)


class _GatedOneDnnBlocks:
    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        self._gate = OneDnnBlocks(gate.weight, gate.bias, "gelu", "tanh")
        self._up = OneDnnBlocks(up.weight, up.bias)
        _release((gate, up))

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._up.times(hidden, self._gate(hidden))
