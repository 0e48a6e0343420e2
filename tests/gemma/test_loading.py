import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.loading import LoadedGemma, default_sampling, load_gemma
from gemma_serve.generation import PanAndScan, SamplingParams, VisionInput
from tests.tiny import IMAGE_SIZE, MAX_MODEL_LEN, save_tiny_checkpoint, tiny_text_model


def load(folder: Path) -> LoadedGemma:
    return load_gemma(ModelConfig(model=str(folder), dtype="float32", device="cpu"))


def edit_json(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_text_checkpoint_is_described(tmp_path: Path) -> None:
    gemma = load(save_tiny_checkpoint(tmp_path / "my-gemma"))
    assert gemma.name == "my-gemma"
    assert gemma.max_model_len == MAX_MODEL_LEN
    assert gemma.default_sampling == SamplingParams(top_k=64, top_p=0.95)
    assert gemma.eos_token_ids == {1, 106}
    assert gemma.stop_strings == ()
    assert gemma.vision is None


def test_weights_arrive_unchanged_and_frozen(tmp_path: Path) -> None:
    gemma = load(save_tiny_checkpoint(tmp_path, seed=3))
    expected = tiny_text_model(seed=3).state_dict()
    assert {k: v.tolist() for k, v in gemma.model.state_dict().items()} == {
        k: v.tolist() for k, v in expected.items()
    }
    assert not gemma.model.training
    assert not any(parameter.requires_grad for parameter in gemma.model.parameters())


def test_vision_checkpoint_is_described(tmp_path: Path) -> None:
    gemma = load(save_tiny_checkpoint(tmp_path, vision=True))
    assert gemma.vision == VisionInput(view_size=IMAGE_SIZE, tokens_per_view=4)
    assert (gemma.image_mean, gemma.image_std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert gemma.max_model_len == MAX_MODEL_LEN


def test_preprocessor_config_decides_over_images(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, vision=True)
    edit_json(
        tmp_path / "preprocessor_config.json",
        image_mean=[0.1, 0.2, 0.3],
        image_std=[1, 2, 3],
        pan_and_scan_min_crop_size=128,
        pan_and_scan_max_num_crops=6,
        pan_and_scan_min_ratio_to_activate=1.5,
    )
    gemma = load(tmp_path)
    assert gemma.vision is not None
    assert gemma.vision.pan_and_scan == PanAndScan(128, 6, 1.5)
    assert (gemma.image_mean, gemma.image_std) == ((0.1, 0.2, 0.3), (1, 2, 3))


def test_broken_preprocessor_config_is_named(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "tiny", vision=True)
    (tmp_path / "tiny/preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json of tiny cannot be read"):
        load(tmp_path / "tiny")


def test_end_of_turn_ends_even_where_the_checkpoint_forgot_it(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=1)
    assert load(tmp_path).eos_token_ids == {1, 106}


@pytest.mark.parametrize("stop", ["\n\nUser:", ["\n\nUser:"]])
def test_stop_strings_of_the_checkpoint_are_kept(tmp_path: Path, stop: str | list[str]) -> None:
    save_tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "generation_config.json", stop_strings=stop)
    assert load(tmp_path).stop_strings == ("\n\nUser:",)


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, SamplingParams()),
        ({"do_sample": False}, SamplingParams(temperature=0.0)),
        (
            {"do_sample": False, "repetition_penalty": 1.1},
            SamplingParams(temperature=0.0, repetition_penalty=1.1),
        ),
        (
            {"do_sample": True, "repetition_penalty": 1.2, "min_p": 0.05},
            SamplingParams(repetition_penalty=1.2, min_p=0.05),
        ),
        ({"do_sample": True, "top_k": 0}, SamplingParams()),
        (
            {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "top_k": 40},
            SamplingParams(temperature=0.3, top_p=0.9, top_k=40),
        ),
    ],
)
def test_default_sampling(generation: dict[str, float], sampling: SamplingParams) -> None:
    assert default_sampling(GenerationConfig(**generation)) == sampling


def test_float16_checkpoint_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    """vllm#14817: what a checkpoint was stored in must not decide over what it is computed in."""
    save_tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", dtype="float16")
    gemma = load_gemma(ModelConfig(model=str(tmp_path), device="cpu"))
    assert {parameter.dtype for parameter in gemma.model.parameters()} == {torch.bfloat16}


def test_missing_weight_is_an_error_not_a_random_tensor(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .* model.layers.3.mlp.up_proj"):
        load(tmp_path)


def test_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "tiny")
    for path in (tmp_path / "tiny").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"tiny has no tokenizer: it lacks tokenizer\.json"):
        load(tmp_path / "tiny")


def test_checkpoint_without_chat_template_gets_gemmas_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    gemma = load(tmp_path)
    assert "<start_of_turn>" in str(gemma.tokenizer.chat_template)
    assert "has no chat template" in caplog.text


def test_start_and_end_are_logged_and_no_bar_is_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tiny_checkpoint(tmp_path / "tiny")
    capfd.readouterr()
    with caplog.at_level(logging.INFO, logger="gemma_serve"):
        load(tmp_path / "tiny")
    assert caplog.messages[0] == "loading tiny on cpu"
    assert caplog.messages[-1].startswith("loaded tiny: 0.00 GB of float32 weights in ")
    assert capfd.readouterr().err == ""
