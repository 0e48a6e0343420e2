"""Checkpoints that are quantised while they are loaded.

float8 needs no package and torch multiplies it on CPUs too, so it stands for all kinds; those of
packages are tested where these are installed.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.config import ModelConfig, Quantization
from gemma_serve.gemma.dummy import AnyGemma3Config, Gemma3Model
from gemma_serve.gemma.loading import load_gemma
from gemma_serve.gemma.placement import Placement
from gemma_serve.gemma.quantization.fp8 import Fp8Linear
from gemma_serve.gemma.quantization.kinds import KINDS
from gemma_serve.gemma.quantization.matrices import quantized_names, quantized_shapes, stored_bytes
from gemma_serve.gemma.weights import load_weights, random_weights
from tests.gemma.harness import loaded, paged_logits, prompt
from tests.tiny import save_tiny_checkpoint, tiny_text_model

CPU = Placement((torch.device("cpu"),), torch.bfloat16)
LARGEST_ERRORS: dict[Quantization, float] = {
    "fp8": 0.15,
    "torchao-int8": 0.05,
    "bitsandbytes-8bit": 0.05,
    "bitsandbytes-4bit": 0.5,
}
"""Relative, of a tiny random model's logits: its weights suffer more than trained ones."""


def logits_of(model: Gemma3Model) -> Tensor:
    (logits,) = paged_logits(loaded(model), [prompt(40)], chunk_size=16, attention=SdpaAttention)
    return logits.float()


@pytest.mark.parametrize("vision", [False, True])
def test_layers_are_quantised_and_the_rest_is_as_it_was(tmp_path: Path, vision: bool) -> None:
    folder = save_tiny_checkpoint(tmp_path, vision=vision)
    whole = load_weights(folder, CPU, "tiny")
    model = load_weights(folder, CPU, "tiny", "fp8")
    names = quantized_names(whole)
    assert {type(model.get_submodule(name)) for name in names} == {Fp8Linear}
    assert quantized_names(model) == []
    kept = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(kept[name], parameter), name
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_no_weight_of_a_quantised_matrix_stays_beside_it(tmp_path: Path) -> None:
    model = load_weights(save_tiny_checkpoint(tmp_path), CPU, "tiny", "fp8")
    assert not [n for n, p in model.named_parameters() if p.device.type == "meta"]
    expected = quantized_shapes(model.config, torch.bfloat16, "fp8")
    assert stored_bytes(model) == stored_bytes(expected)


@pytest.mark.parametrize("quantization", LARGEST_ERRORS)
def test_logits_stay_close_to_those_of_bfloat16(tmp_path: Path, quantization: Quantization) -> None:
    _require_package(quantization)
    wide_model().save_pretrained(tmp_path)
    exact = logits_of(load_weights(tmp_path, CPU, "tiny"))
    found = logits_of(load_weights(tmp_path, CPU, "tiny", quantization))
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < LARGEST_ERRORS[quantization]


@pytest.mark.parametrize("quantization", LARGEST_ERRORS)
def test_random_weights_are_quantised_too_and_take_what_was_foretold(
    quantization: Quantization,
) -> None:
    _require_package(quantization)
    config = wide_model().config
    model = random_weights(config, CPU, "tiny", quantization)
    assert stored_bytes(model) == pytest.approx(
        stored_bytes(quantized_shapes(config, torch.bfloat16, quantization)), rel=0.05
    )
    assert logits_of(model).isfinite().all()
    assert logits_of(model).std() > 0.01


def test_random_weights_are_the_same_at_every_start() -> None:
    first, second = (random_weights(tiny_config(), CPU, "tiny", "fp8") for _ in range(2))
    assert torch.equal(logits_of(first), logits_of(second))


def test_the_setting_reaches_the_weights_and_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _require_package("torchao-int8")
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    with caplog.at_level("INFO"):
        gemma = load_gemma(
            ModelConfig(model=str(folder), device="cpu", quantization="torchao-int8")
        )
    assert "with torchao-int8 matrices" in caplog.messages[-1]
    assert not any(type(module) is nn.Linear for module in gemma.model.get_decoder().modules())


def test_activations_beyond_float16_are_multiplied_in_8_bits_all_the_same() -> None:
    """bitsandbytes casts them; vllm#14817 is what comes of that."""
    _require_package("bitsandbytes-8bit")
    from gemma_serve.gemma.quantization.linears import quantize_linear

    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[1] *= 1e6
    exact = linear(hidden).float()
    product = quantize_linear(linear, "bitsandbytes-8bit")(hidden).float()
    for row in range(3):
        assert (product[row] - exact[row]).norm() < 0.05 * exact[row].norm()


def wide_model() -> Gemma3Model:
    """bitsandbytes packs 4-bit weights for AVX-512 in rows of 64."""
    return tiny_text_model(hidden_size=64, intermediate_size=128)


def tiny_config() -> AnyGemma3Config:
    config: AnyGemma3Config = tiny_text_model().config
    return config


def _require_package(quantization: Quantization) -> None:
    if package := KINDS[quantization].package:
        pytest.importorskip(package)
