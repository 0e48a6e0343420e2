"""How many blocks the KV cache gets."""

import logging

import torch

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.kv_cache import CacheLayout

logger = logging.getLogger(__name__)

_GIB = 1024**3

_CPU_CACHE_BYTES = 1 * _GIB
"""Unless the operator says more: 50 thousand tokens of the 270M model, touched as they are used."""

_GPU_MEMORY_USE = 0.9
"""Of what is free once the weights are loaded; the rest is for activations and fragmentation."""


def num_cache_blocks(layout: CacheLayout, config: EngineConfig, *, max_model_len: int) -> int:
    """Blocks in ``kv_cache_memory_bytes``, or else in what the device has to give.

    Raises ``ConfigurationError`` if one sequence of ``max_model_len`` tokens does not fit.
    """
    bytes_per_block = layout.bytes_per_block(config.block_size)
    # Only the arithmetic of the manager is asked for, so it needs no blocks.
    blocks = BlockManager(num_blocks=0, block_size=config.block_size, windows=layout.windows)
    longest = blocks.blocks_for(max_model_len, chunk_size=config.prefill_chunk_size)
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    else:
        budget = _default_budget(layout, longest * bytes_per_block)
    num_blocks = budget // bytes_per_block
    if num_blocks < longest:
        raise ConfigurationError(
            f"The KV cache has {budget / _GIB:.2f} GiB, but one sequence of max_model_len="
            f"{max_model_len} tokens needs {longest * bytes_per_block / _GIB:.2f} GiB. Raise "
            "kv_cache_memory, lower max_model_len, or use a larger or further GPU."
        )
    typical = blocks.blocks_for(min(8192, max_model_len), chunk_size=config.prefill_chunk_size)
    logger.info(
        "KV cache: %.2f GiB in %d blocks of %d tokens; holds %d sequences of %d tokens",
        num_blocks * bytes_per_block / _GIB,
        num_blocks,
        config.block_size,
        num_blocks // typical,
        min(8192, max_model_len),
    )
    return num_blocks


def _default_budget(layout: CacheLayout, longest_bytes: int) -> int:
    if layout.plane_devices[0].type != "cuda":
        return max(_CPU_CACHE_BYTES, longest_bytes)
    # Every block has a part on every device, so the fullest device decides.
    num_planes = len(layout.plane_devices)
    per_device = [
        torch.cuda.mem_get_info(device)[0] * _GPU_MEMORY_USE / layout.plane_devices.count(device)
        for device in set(layout.plane_devices)
    ]
    return int(min(per_device) * num_planes)
