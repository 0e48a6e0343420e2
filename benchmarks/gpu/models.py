"""Models with random weights, in Gemma 3's shapes or in a tiny one."""

import gc
from typing import Final

import torch
from transformers import Gemma3TextConfig

from benchmarks.gpu.devices import release_memory
from benchmarks.gpu.scale import Scale
from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import Device, ModelConfig, Quantization
from gemma_serve.gemma.dummy import AnyGemma3Config, dummy_config
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.gemma.placement import Placement, place
from gemma_serve.gemma.quantization.kinds import require_kind
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.gemma.weights import random_weights
from gemma_serve.generation import SamplingParams

TINY: Final = "tiny"
TINY_CONFIG: Final = Gemma3TextConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=32,
    max_position_embeddings=4096,
)


def config_of(size: str) -> AnyGemma3Config:
    """``size``: ``tiny``, or one of Gemma 3's."""
    return TINY_CONFIG if size == TINY else dummy_config(size)


def load(size: str, device: Device, quantization: Quantization = "none") -> LoadedGemma:
    """Raises ``ConfigurationError`` where this machine lacks something for it."""
    config = ModelConfig(model=f"dummy:{size}", device=device, quantization=quantization)
    return _load_tiny(config) if size == TINY else load_gemma(config)


def _load_tiny(config: ModelConfig) -> LoadedGemma:
    placement: Placement = place(config)
    require_kind(config.quantization, placement)
    return LoadedGemma(
        name=TINY,
        model=random_weights(TINY_CONFIG, placement, TINY, config.quantization),
        tokenizer=synthetic_tokenizer(
            vocab_size=TINY_CONFIG.vocab_size, boi_token_id=1021, eoi_token_id=1022
        ),
        max_model_len=TINY_CONFIG.max_position_embeddings,
        default_sampling=SamplingParams(),
        eos_token_ids=frozenset({1}),
        stop_strings=(),
        vision=None,
    )


def engine_config(scale: Scale) -> EngineConfig:
    """Without a prefix cache, so that every prompt is computed."""
    return EngineConfig(
        max_model_len=scale.max_model_len,
        max_num_seqs=max(scale.num_streams),
        prefill_chunk_size=scale.prefill_chunk_size,
        kv_cache_memory_bytes=scale.kv_cache_memory_bytes,
        enable_prefix_cache=False,
    )


def collect(device: torch.device) -> None:
    """After the last name of a model is gone: its modules refer to each other."""
    gc.collect()
    release_memory(device)
