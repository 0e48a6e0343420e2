"""Checkpoints that come quantised."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_serve.errors import CheckpointError, ConfigurationError
from gemma_serve.gemma.config import ModelConfig, Quantization
from gemma_serve.gemma.loading import load_gemma
from gemma_serve.gemma.quantization.quantized_checkpoints import require_no_float16
from tests.gemma.test_loading import edit_json
from tests.tiny import save_tiny_checkpoint, tiny_text_model


def refusal(folder: Path, quantization: Quantization = "none", **stated: object) -> str:
    save_tiny_checkpoint(folder)
    edit_json(folder / "config.json", quantization_config=stated)
    config = ModelConfig(model=str(folder), device="cpu", quantization=quantization)
    with pytest.raises(ConfigurationError) as caught:
        load_gemma(config)
    return str(caught.value)


def test_awq_is_refused_for_its_float16(tmp_path: Path) -> None:
    message = refusal(tmp_path / "tiny", quant_method="awq")
    assert message.startswith(
        "model: tiny is quantised with awq, whose kernels compute in float16: Gemma 3's activations"
    )
    assert "with quantization: torchao-int4 or bitsandbytes-4bit" in message


def test_unknown_method_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    message = refusal(tmp_path / "tiny", quant_method="squeezellm")
    assert message.startswith("model: tiny is quantised with squeezellm, which transformers does")
    assert "compressed-tensors" in message
    assert "awq" not in message


def test_quantising_twice_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    message = refusal(tmp_path / "tiny", "torchao-int8", quant_method="gptq", bits=4)
    assert message == (
        "quantization: tiny is already quantised with gptq, so torchao-int8 cannot be applied: "
        "leave it out, or use the bfloat16 checkpoint"
    )


def test_what_a_method_lacks_here_is_said_in_transformers_words(tmp_path: Path) -> None:
    message = refusal(tmp_path / "tiny", quant_method="gptq", bits=4)
    assert message.startswith("model: tiny cannot be loaded here: ")
    assert "gptq" in message.lower()


def test_float16_norms_are_refused_whatever_brought_them(tmp_path: Path) -> None:
    del tmp_path
    with pytest.raises(CheckpointError, match=r"tiny computes in float16 \(model\.layers\.0\."):
        require_no_float16(tiny_text_model(dtype=torch.float16), "tiny")


def test_checkpoint_of_bitsandbytes_is_loaded_as_it_is(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = save_tiny_checkpoint(tmp_path / "source")
    quantized = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    folder = save_tiny_checkpoint(tmp_path / "quantized")
    quantized.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    gemma = load_gemma(ModelConfig(model=str(folder), device="cpu"))
    layer = gemma.model.get_decoder().layers[0]
    assert isinstance(layer.self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    assert layer.input_layernorm.weight.dtype is torch.bfloat16
