"""Tiny random Gemma 3 models, quick enough for every test.

They differ from the defaults wherever a wrong implementation could hide behind one: the attention
scale is not ``1/sqrt(head_dim)``, full layers have scaled rotary frequencies, norms are not
neutral, heads times ``head_dim`` is not ``hidden_size``, and a vision model's embedding has rows
beyond the tokenizer's.
"""

from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

from gemma_serve.gemma.demo import write_preprocessor_config
from gemma_serve.gemma.dummy import (
    Gemma3Model,
    dummy_generation_config,
    empty_model,
    randomize_weights,
)
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer

VOCAB_SIZE: Final = 512
BOI_TOKEN_ID: Final = 509
EOI_TOKEN_ID: Final = 510
IMAGE_TOKEN_ID: Final = 512
NUM_EMBEDDING_ROWS: Final = 520
"""Rows of a vision model's embedding; those after ``IMAGE_TOKEN_ID`` are no token at all."""
MAX_MODEL_LEN: Final = 4096
IMAGE_SIZE: Final = 28
_WEIGHT_STD: Final = 0.2
_NORM_STD: Final = 0.3
_EMBEDDING_GAIN: Final = 1 / 8


def tiny_text_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 6,
    sliding_window: int = 16,
    num_kv_heads: int = 2,
    hidden_size: int = 32,
    intermediate_size: int = 48,
) -> Gemma3ForCausalLM:
    """A text-only model of ``VOCAB_SIZE`` tokens; of six layers the last has full attention."""
    config = _text_config(VOCAB_SIZE, num_layers, sliding_window, num_kv_heads)
    config.hidden_size, config.intermediate_size = hidden_size, intermediate_size
    model = _random_model(config, dtype, seed)
    assert isinstance(model, Gemma3ForCausalLM)
    return model


def tiny_vision_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 6,
    sliding_window: int = 16,
    num_kv_heads: int = 2,
    mm_tokens_per_image: int = 4,
) -> Gemma3ForConditionalGeneration:
    """A model with eyes: ``IMAGE_SIZE`` pixels a side, 4 x 4 patches, 1, 4 or 16 soft tokens."""
    config = Gemma3Config(
        text_config=_text_config(NUM_EMBEDDING_ROWS, num_layers, sliding_window, num_kv_heads),
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=7,
            vision_use_head=False,
        ),
        mm_tokens_per_image=mm_tokens_per_image,
        boi_token_index=BOI_TOKEN_ID,
        eoi_token_index=EOI_TOKEN_ID,
        image_token_index=IMAGE_TOKEN_ID,
    )
    model = _random_model(config, dtype, seed)
    assert isinstance(model, Gemma3ForConditionalGeneration)
    return model


def tiny_tokenizer(*, vision: bool = False) -> PreTrainedTokenizerBase:
    """One token per byte, Gemma's ids for special tokens and newlines, Gemma's chat template."""
    return synthetic_tokenizer(
        vocab_size=VOCAB_SIZE,
        boi_token_id=BOI_TOKEN_ID,
        eoi_token_id=EOI_TOKEN_ID,
        image_token_id=IMAGE_TOKEN_ID if vision else None,
    )


def save_tiny_checkpoint(folder: Path, *, vision: bool = False, seed: int = 0) -> Path:
    """Write what a download from the Hub would leave in ``folder``, and return it."""
    model: Gemma3Model = tiny_vision_model(seed) if vision else tiny_text_model(seed)
    model.save_pretrained(folder)
    tiny_tokenizer(vision=vision).save_pretrained(folder)
    if vision:
        tokens_per_image = model.config.mm_tokens_per_image
        write_preprocessor_config(folder, image_size=IMAGE_SIZE, tokens_per_image=tokens_per_image)
    return folder


def _text_config(
    num_rows: int, num_layers: int, sliding_window: int, num_kv_heads: int
) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=num_rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=sliding_window,
        max_position_embeddings=MAX_MODEL_LEN,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )


def _random_model(
    config: Gemma3Config | Gemma3TextConfig, dtype: torch.dtype, seed: int
) -> Gemma3Model:
    model = empty_model(config, dtype=dtype, device=torch.device("cpu"))
    randomize_weights(model, seed=seed, std=_WEIGHT_STD)
    _randomize_norms(model, torch.Generator().manual_seed(seed))
    _quieten_embedding(model)
    model.generation_config = dummy_generation_config()
    return model


@torch.no_grad()
def _randomize_norms(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * _NORM_STD)


@torch.no_grad()
def _quieten_embedding(model: Gemma3Model) -> None:
    """Let the layers decide the next token: a loud tied embedding only repeats the last one."""
    model.get_input_embeddings().weight.mul_(_EMBEDDING_GAIN)
    model.get_decoder().norm.weight.add_(1).mul_(1 / _EMBEDDING_GAIN).sub_(1)
