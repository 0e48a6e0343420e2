"""Gemma 3 in its exact shapes with random weights: capacity and speed without a download."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    SiglipVisionConfig,
)
from transformers.initialization import no_init_weights

Gemma3Model: TypeAlias = Gemma3ForCausalLM | Gemma3ForConditionalGeneration
AnyGemma3Config: TypeAlias = Gemma3Config | Gemma3TextConfig

# The Gemma 3 technical report (arXiv:2503.19786), tables 1 and 2, and the checkpoints' config.json.
_TEXT_SHAPES: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "270m": {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
        "1b": {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
        "4b": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        "12b": {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        "27b": {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
        },
    }
)
_TEXT_ONLY_SIZES: Final = frozenset({"270m", "1b"})
_SEED: Final = 0
_WEIGHT_STD: Final = 0.02  # initializer_range of every Gemma 3 config


def dummy_config(size: str) -> AnyGemma3Config:
    """The configuration of Gemma 3 ``size``, one of ``checkpoints.DUMMY_SIZES``."""
    shape = _TEXT_SHAPES[size]
    if size in _TEXT_ONLY_SIZES:
        return Gemma3TextConfig(
            **shape, vocab_size=262_144, sliding_window=512, max_position_embeddings=32_768
        )
    text_config = Gemma3TextConfig(
        **shape,
        vocab_size=262_208,
        sliding_window=1024,
        max_position_embeddings=131_072,
        # Only the full-attention layers are stretched to the long context.
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    vision_config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    return Gemma3Config(text_config=text_config, vision_config=vision_config)


def dummy_generation_config() -> GenerationConfig:
    """What the instruction-tuned checkpoints ship."""
    return GenerationConfig(
        bos_token_id=2,
        eos_token_id=[1, 106],
        pad_token_id=0,
        do_sample=True,
        top_k=64,
        top_p=0.95,
    )


def empty_model(
    config: AnyGemma3Config, *, dtype: torch.dtype, device: torch.device
) -> Gemma3Model:
    """A model on ``device`` in eval mode whose weights are uninitialised memory.

    Its buffers (rotary frequencies, embedding scale) are right: they are computed where the model
    is built, which a detour over the meta device would lose.
    """
    with no_init_weights(), device:
        model: Gemma3Model = model_class(config)._from_config(config, dtype=dtype)
    model.tie_weights()  # part of the initialisation that was left out
    return model.eval().requires_grad_(False)


def model_class(config: AnyGemma3Config) -> type[Gemma3Model]:
    """The text-only class or the one with a vision tower."""
    has_vision = config.model_type == "gemma3"
    chosen: type[Gemma3Model] = Gemma3ForConditionalGeneration if has_vision else Gemma3ForCausalLM
    return chosen


@torch.no_grad()
def randomize_weights(model: nn.Module, *, seed: int = _SEED, std: float = _WEIGHT_STD) -> None:
    """Fill ``model`` where its weights are: normal matrices, neutral norms, zero biases."""
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in model.parameters():
        if parameter.ndim == 1:  # Biases, and RMSNorm weights, to which Gemma adds one.
            parameter.zero_()
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        parameter.normal_(std=std, generator=generators[parameter.device])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
