import torch
from torch import nn

from gemma_serve.gemma.projections import projection
from gemma_serve.gemma.quantization.fp8 import Fp8Linear


def random_linear(out_features: int, in_features: int = 64, *, seed: int = 0) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    linear.weight = nn.Parameter(
        torch.randn(out_features, in_features, generator=generator).bfloat16(), requires_grad=False
    )
    return linear


def rows(num_rows: int, *, scale: float = 1.0) -> torch.Tensor:
    return (
        torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(9)) * scale
    ).bfloat16()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def test_product_is_that_of_bfloat16_to_three_bits() -> None:
    linear = random_linear(32)
    assert relative_error(Fp8Linear(linear.weight)(rows(5)), linear(rows(5))) < 0.05


def test_large_and_small_rows_are_as_precise_as_any_others() -> None:
    """Each row has its own scale: activations of 1e5, as Gemma 3 has them, or of 1e-4."""
    linear = random_linear(32)
    mixed = torch.cat((rows(2, scale=1e5), rows(2, scale=1e-4)))
    product, exact = Fp8Linear(linear.weight)(mixed), linear(mixed)
    assert relative_error(product[:2], exact[:2]) < 0.05
    assert relative_error(product[2:], exact[2:]) < 0.05


def test_rows_of_zeros_give_zeros() -> None:
    product = Fp8Linear(random_linear(32).weight)(torch.zeros(3, 64, dtype=torch.bfloat16))
    assert torch.equal(product, torch.zeros(3, 32, dtype=torch.bfloat16))


def test_projections_of_the_same_rows_become_one_product_and_share_its_memory() -> None:
    parts = [Fp8Linear(random_linear(n, seed=n).weight) for n in (64, 32, 16)]
    apart = torch.cat([part(rows(5)) for part in parts], dim=-1)
    whole = projection(*parts)
    assert isinstance(whole, Fp8Linear)
    torch.testing.assert_close(whole(rows(5)), apart, rtol=0, atol=0)
    storage = whole.weight.untyped_storage().data_ptr()
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == {storage}


def test_weights_take_a_byte_each() -> None:
    quantized = Fp8Linear(random_linear(32).weight)
    assert sum(parameter.nbytes for parameter in quantized.parameters()) == 32 * 64 + 32 * 4
