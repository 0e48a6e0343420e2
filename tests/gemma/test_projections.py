"""Products give what the modules gave that they replace, whichever way the weights lie."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.native.products import GatedTileBlocks, TileBlocks
from gemma_serve.gemma.projections import (
    HalfBlocks,
    OneDnnBlocks,
    activation_dtype,
    feed_forward,
    output_projection,
    projection,
)
from tests.gemma.native_kernels import needs_tiles

CPU = torch.device("cpu")
ACTIVATIONS = activation_dtype(torch.bfloat16, CPU)
"""What products with bfloat16 weights take on the machine that runs the tests."""
HAS_ONEDNN_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

needs_packing = pytest.mark.skipif(
    not (HAS_ONEDNN_BFLOAT16 or HAS_FBGEMM), reason="bfloat16 weights are not packed on this CPU"
)
needs_fbgemm = pytest.mark.skipif(not HAS_FBGEMM, reason="torch has no FBGEMM on this CPU")


def linears(
    *sizes: int, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[nn.Linear, ...]:
    torch.manual_seed(0)
    modules = tuple(nn.Linear(32, size, bias=bias, dtype=dtype) for size in sizes)
    for module in modules:
        module.requires_grad_(False)
    return modules


def hidden(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def mlp(dtype: torch.dtype) -> Gemma3MLP:
    torch.manual_seed(0)
    config = Gemma3TextConfig(hidden_size=32, intermediate_size=48)
    return Gemma3MLP(config).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_products_stand_side_by_side(bias: bool) -> None:
    modules = linears(16, 8, 8, bias=bias)
    expected = torch.cat([module(hidden(5)) for module in modules], dim=-1)
    torch.testing.assert_close(projection(*modules)(hidden(5)), expected)


def test_joined_modules_still_work_and_share_their_weights() -> None:
    modules = linears(16, 8)
    expected = modules[1](hidden(5))
    projection(*modules)
    torch.testing.assert_close(modules[1](hidden(5)), expected)
    first, second = (module.weight.untyped_storage().data_ptr() for module in modules)
    assert first == second


def test_a_single_module_keeps_its_weight() -> None:
    (module,) = linears(16)
    weight = module.weight
    projection(module)
    assert module.weight is weight


def test_modules_of_another_kind_multiply_themselves() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    torch.manual_seed(0)
    modules = Doubling(32, 4, bias=False), nn.Linear(32, 4, bias=False)
    expected = torch.cat([module(hidden(3)) for module in modules], dim=-1)
    torch.testing.assert_close(projection(*modules)(hidden(3)), expected)


@needs_packing
@pytest.mark.parametrize("num_tokens", [1, 8, 33, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_same_products(num_tokens: int, bias: bool) -> None:
    modules = linears(16, 8, dtype=torch.bfloat16, bias=bias)
    inputs = hidden(num_tokens, torch.bfloat16)
    expected = torch.cat([module(inputs) for module in modules], dim=-1)
    products = projection(*modules)(inputs.to(ACTIVATIONS))
    assert products.dtype == ACTIVATIONS
    torch.testing.assert_close(products.bfloat16(), expected)


@needs_packing
def test_packed_weights_take_the_place_of_the_rows() -> None:
    modules = linears(16, 8, dtype=torch.bfloat16)
    projection(*modules)
    assert [module.weight.numel() for module in modules] == [0, 0]


@needs_packing
def test_the_vocabulary_keeps_its_rows_for_the_embedding() -> None:
    (head,) = linears(16, dtype=torch.bfloat16)
    expected = head(hidden(3, torch.bfloat16))
    logits = output_projection(head)(hidden(3, torch.bfloat16).to(ACTIVATIONS))
    torch.testing.assert_close(logits.bfloat16(), expected)
    assert head.weight.shape == (16, 32)


@needs_fbgemm
def test_blocks_of_float16_hold_bfloat16_weights_exactly() -> None:
    """All that a bfloat16 can say between 2**-17 and 2**15 comes back from the product with one."""
    exponents = torch.arange(-17, 15).repeat_interleave(128)
    mantissas = 1 + torch.arange(128).repeat(32) / 128
    weight = (mantissas * 2.0**exponents).bfloat16().unsqueeze(1)
    products = HalfBlocks(weight, None)(torch.ones(1, 1))
    assert torch.equal(products[0], weight[:, 0].float())


@needs_fbgemm
def test_blocks_of_float16_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(CheckpointError, match="larger than 65504"):
        HalfBlocks(torch.tensor([[1.0, -70000.0]]).bfloat16(), None)


@needs_fbgemm
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_blocks_of_float16_multiply_in_float32(num_tokens: int) -> None:
    (module,) = linears(24, dtype=torch.bfloat16, bias=True)
    exact = module.float()(hidden(num_tokens))
    blocks = HalfBlocks(module.weight.bfloat16(), module.bias.bfloat16())
    torch.testing.assert_close(blocks(hidden(num_tokens)), exact, rtol=1e-5, atol=1e-5)


@needs_fbgemm
@pytest.mark.parametrize("bias", [False, True])
def test_large_blocks_are_multiplied_in_parts(bias: bool) -> None:
    """Three parts of 10 MiB, the last one smaller, in the order of the outputs."""
    torch.manual_seed(0)
    module = nn.Linear(4096, 3000, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    inputs = torch.randn(2, 4096)
    products = HalfBlocks(module.weight, module.bias)(inputs)
    torch.testing.assert_close(products, module.float()(inputs), rtol=1e-4, atol=1e-4)


def test_feed_forward_equals_the_module() -> None:
    module = mlp(torch.float32)
    expected = module(hidden(5))
    torch.testing.assert_close(feed_forward(module)(hidden(5)), expected)


@needs_packing
def test_packed_feed_forward_is_closer_to_float32_than_the_module() -> None:
    exact = mlp(torch.float32).to(torch.bfloat16).float()(hidden(40, torch.bfloat16).float())
    half = mlp(torch.bfloat16)
    inputs = hidden(40, torch.bfloat16)
    error_of_module = (half(inputs).float() - exact).norm()
    error = (feed_forward(half)(inputs.to(ACTIVATIONS)).float() - exact).norm()
    assert error <= error_of_module


class Quantized(Tensor):
    """As quantised checkpoints have them: a matrix like any other, but not one of torch's."""


def test_weights_that_are_not_torchs_own_are_left_to_their_modules() -> None:
    modules = linears(16, 8, dtype=torch.bfloat16)
    for module in modules:
        weight = module.weight.detach().as_subclass(Quantized)
        module.weight = nn.Parameter(weight, requires_grad=False)
    rows = hidden(5, torch.bfloat16)
    product = projection(*modules)(rows)
    assert torch.equal(product, torch.cat([module(rows) for module in modules], dim=-1))
    assert [module.weight.numel() for module in modules] == [16 * 32, 8 * 32]


@needs_tiles
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 32, 33, 64, 75])
def test_tiles_give_the_product_for_any_number_of_rows(num_rows: int) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(96, 64).bfloat16(), torch.randn(num_rows, 64).bfloat16()
    expected = (rows.float() @ weight.float().T).bfloat16()
    torch.testing.assert_close(TileBlocks(weight)(rows), expected, atol=0.05, rtol=0.01)


@needs_tiles
@pytest.mark.parametrize("num_rows", [1, 20, 40])
def test_gated_tiles_round_once(num_rows: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(num_rows, 64).bfloat16()
    gate, up = (torch.randn(2, 48, 64) * 0.4).bfloat16()
    sums = [rows.float() @ weight.float().T for weight in (gate, up)]
    expected = nn.functional.gelu(sums[0], approximate="tanh") * sums[1]
    got = GatedTileBlocks(gate, up)(rows)
    torch.testing.assert_close(got, expected.bfloat16(), atol=0.02, rtol=0.01)


@needs_tiles
def test_a_gate_that_is_shut_is_zero_and_one_that_is_not_a_number_is_none() -> None:
    gate = torch.zeros(32, 32).bfloat16()
    gate[:, 0] = 1
    rows = torch.zeros(3, 32).bfloat16()
    rows[:, 0] = torch.tensor([-1e4, 1e4, torch.nan])
    shut, wide, broken = GatedTileBlocks(gate, gate.abs())(rows).float()
    assert (shut.abs() < 1e-3).all()
    torch.testing.assert_close(wide, torch.full((32,), 1e8), rtol=0.01, atol=0)
    assert broken.isnan().all()


@needs_tiles
@pytest.mark.parametrize("sizes", [(64,), (64, 32, 32)])
def test_native_products_take_the_place_of_the_rows(sizes: tuple[int, ...]) -> None:
    modules = linears(*sizes, dtype=torch.bfloat16)
    expected = torch.cat([module(hidden(5, torch.bfloat16)) for module in modules], dim=-1)
    product = projection(*modules, kernels="native")
    assert isinstance(product, TileBlocks)
    assert all(module.weight.numel() == 0 for module in modules)
    torch.testing.assert_close(product(hidden(5, torch.bfloat16)), expected, atol=0.02, rtol=0.02)


@needs_tiles
def test_weights_that_tiles_cannot_hold_are_packed_as_before() -> None:
    (odd,) = linears(24, dtype=torch.bfloat16)
    (biased,) = linears(32, dtype=torch.bfloat16, bias=True)
    for module in (odd, biased):
        assert isinstance(projection(module, kernels="native"), OneDnnBlocks)
