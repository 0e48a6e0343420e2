import math

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from gemma_serve.gemma.checkpoints import DUMMY_SIZES, DummySize
from gemma_serve.gemma.dummy import (
    dummy_config,
    dummy_generation_config,
    empty_model,
    randomize_weights,
)
from tests.tiny import tiny_text_model, tiny_vision_model

CPU, META = torch.device("cpu"), torch.device("meta")


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("270m", 268_098_176),
        ("1b", 999_885_952),
        ("4b", 4_300_079_472),
        ("12b", 12_187_325_040),
        ("27b", 27_432_406_640),
    ],
)
def test_parameter_count_is_the_published_one(size: DummySize, total: int) -> None:
    model = empty_model(dummy_config(size), dtype=torch.bfloat16, device=META)
    assert num_parameters(model) == total


@pytest.mark.parametrize(("size", "millions"), [("4b", 420), ("12b", 421), ("27b", 423)])
def test_vision_tower_and_projector_have_the_published_size(size: DummySize, millions: int) -> None:
    model = empty_model(dummy_config(size), dtype=torch.bfloat16, device=META).model
    total = num_parameters(model.vision_tower) + num_parameters(model.multi_modal_projector)
    assert round(total / 1e6) == millions


@pytest.mark.parametrize("size", DUMMY_SIZES)
def test_attention_matches_gemma3(size: DummySize) -> None:
    config = dummy_config(size).get_text_config()
    large = size not in ("270m", "1b")
    every_sixth = ["sliding_attention"] * 5 + ["full_attention"]
    assert config.layer_types == (every_sixth * 11)[: config.num_hidden_layers]
    assert config.sliding_window == (1024 if large else 512)
    assert config.query_pre_attn_scalar == (168 if size == "27b" else 256)
    assert config.max_position_embeddings == (131_072 if large else 32_768)
    assert config.rope_parameters["sliding_attention"] == {
        "rope_type": "default",
        "rope_theta": 10_000.0,
    }
    stretched = {"rope_type": "linear", "factor": 8.0} if large else {"rope_type": "default"}
    assert config.rope_parameters["full_attention"] == {**stretched, "rope_theta": 1_000_000.0}


def test_buffers_equal_those_of_a_model_built_the_usual_way() -> None:
    config = tiny_vision_model().config
    usual = dict(Gemma3ForConditionalGeneration(config).named_buffers())
    model = empty_model(config, dtype=torch.float32, device=CPU)
    assert {name for name, _ in model.named_buffers()} == set(usual)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, usual[name]), name


def test_rotary_frequencies_stay_float32_in_bfloat16() -> None:
    model = empty_model(tiny_text_model().config, dtype=torch.bfloat16, device=CPU)
    usual = Gemma3ForCausalLM(tiny_text_model().config)
    expected = usual.model.rotary_emb.full_attention_inv_freq
    assert torch.equal(model.model.rotary_emb.full_attention_inv_freq, expected)


def test_random_weights_are_finite_neutral_where_they_must_be_and_repeatable() -> None:
    model = tiny_vision_model()
    randomize_weights(model)
    norm = model.model.language_model.norm.weight
    layer_norm = model.model.vision_tower.post_layernorm
    assert torch.equal(norm, torch.zeros_like(norm))
    assert torch.equal(layer_norm.weight, torch.ones_like(layer_norm.weight))
    assert torch.equal(layer_norm.bias, torch.zeros_like(layer_norm.bias))
    embedding = model.get_input_embeddings().weight
    assert math.isclose(embedding.std().item(), 0.02, rel_tol=0.05)
    again = tiny_vision_model(seed=1)
    randomize_weights(again)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_head_is_tied_to_the_embedding() -> None:
    model = empty_model(tiny_text_model().config, dtype=torch.float32, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    randomize_weights(empty_model(tiny_text_model().config, dtype=torch.float32, device=CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_config_is_that_of_the_instruction_tuned_models() -> None:
    generation = dummy_generation_config()
    assert (generation.eos_token_id, generation.top_k, generation.top_p) == ([1, 106], 64, 0.95)
