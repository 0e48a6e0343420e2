"""How many blocks the KV cache gets."""

import logging
from typing import Final

import torch
from transformers import Gemma3TextConfig

from gemma_serve.engine.block_manager import max_blocks_held
from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.sdpa import MAX_GATHERED_KEYS
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.kv_cache import CacheLayout

logger = logging.getLogger(__name__)

_MIB: Final = 1024**2
_GIB: Final = 1024**3

_CPU_CACHE_BYTES: Final = 1 * _GIB
"""Unless the operator says more. Memory is touched only as sequences use it."""

_GPU_MEMORY_SHARE: Final = 0.95
"""Of what is left beside weights and activations; the rest goes to fragmentation."""

_CPU_VISION_CACHE_BYTES: Final = 256 * _MIB
_GPU_VISION_CACHE_SHARE: Final = 0.01


def num_cache_blocks(
    layout: CacheLayout, model: Gemma3Model, config: EngineConfig, *, max_model_len: int
) -> int:
    """Blocks in ``kv_cache_memory_bytes``, or else in what the device has to give.

    Raises ``ConfigurationError`` if one sequence of ``max_model_len`` tokens does not fit.
    """
    bytes_per_block = layout.bytes_per_block(config.block_size)
    longest = _blocks_held(layout, config, max_model_len)
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = _default_budget(layout, model, config, max_model_len, longest * bytes_per_block)
    num_blocks = budget // bytes_per_block
    if num_blocks < longest:
        raise ConfigurationError(
            f"The KV cache has {budget / _MIB:.1f} MiB, but one sequence of max_model_len="
            f"{max_model_len} tokens needs {longest * bytes_per_block / _MIB:.1f} MiB. Lower "
            "max_model_len, raise kv_cache_memory, or use a larger or another GPU."
        )
    chat_len = min(8192, max_model_len)
    logger.info(
        "KV cache: %.2f GiB in %d blocks of %d tokens; holds %d sequences of %d tokens",
        num_blocks * bytes_per_block / _GIB,
        num_blocks,
        config.block_size,
        num_blocks // _blocks_held(layout, config, chat_len),
        chat_len,
    )
    return num_blocks


def vision_cache_bytes(config: EngineConfig, *, gpu_bytes: int | None) -> int:
    """Memory for features of images. ``gpu_bytes``: all that the GPU has; ``None`` on a CPU."""
    if config.vision_cache_memory_bytes is not None:
        return config.vision_cache_memory_bytes
    if gpu_bytes is None:
        return _CPU_VISION_CACHE_BYTES
    return int(gpu_bytes * _GPU_VISION_CACHE_SHARE)


def activation_bytes(model: Gemma3Model, config: EngineConfig, *, max_model_len: int) -> int:
    """An upper estimate of what a step needs beside weights and cache, on any one device.

    Its largest parts are the keys and values that ``SdpaAttention`` gathers for the longest
    sequence, once as they are read and once in the kernel's layout, and that chunk's mask.
    """
    text: Gemma3TextConfig = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    group_size = text.num_attention_heads // text.num_key_value_heads
    bytes_per_key = 2 * text.num_key_value_heads * text.head_dim * itemsize
    num_tokens = config.prefill_chunk_size + config.max_num_seqs
    gathered = 2 * max(max_model_len, MAX_GATHERED_KEYS) * bytes_per_key
    mask = 2 * config.prefill_chunk_size * group_size * max_model_len * itemsize
    hidden = 4 * num_tokens * (3 * text.intermediate_size + 4 * text.hidden_size)
    logits = config.max_num_seqs * text.vocab_size * (itemsize + 8)  # and two float32 copies
    return int(gathered + mask + hidden + logits + _vision_bytes(model, config))


def _vision_bytes(model: Gemma3Model, config: EngineConfig) -> int:
    """For as many images as one chunk can hold."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return 0
    num_views = max(1, config.prefill_chunk_size // model.config.mm_tokens_per_image)
    num_patches = (vision.image_size // vision.patch_size) ** 2
    per_patch = 4 * (vision.intermediate_size + 4 * vision.hidden_size)
    return int(num_views * num_patches * per_patch * model.dtype.itemsize)


def _default_budget(
    layout: CacheLayout,
    model: Gemma3Model,
    config: EngineConfig,
    max_model_len: int,
    longest_bytes: int,
) -> int:
    if layout.plane_devices[0].type != "cuda":
        return max(_CPU_CACHE_BYTES, longest_bytes)
    total = torch.cuda.mem_get_info(layout.plane_devices[0])[1]
    reserved = activation_bytes(model, config, max_model_len=max_model_len)
    reserved += vision_cache_bytes(config, gpu_bytes=total)
    # Every block has a part on every device, so the fullest device decides.
    per_plane = min(
        (torch.cuda.mem_get_info(device)[0] - reserved) / layout.plane_devices.count(device)
        for device in set(layout.plane_devices)
    )
    return max(0, int(per_plane * len(layout.plane_devices) * _GPU_MEMORY_SHARE))


def _blocks_held(layout: CacheLayout, config: EngineConfig, num_tokens: int) -> int:
    return max_blocks_held(
        num_tokens,
        chunk_size=config.prefill_chunk_size,
        block_size=config.block_size,
        windows=layout.windows,
    )
