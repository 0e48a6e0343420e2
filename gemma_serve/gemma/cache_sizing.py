"""How much memory the caches get, in plain numbers."""

import logging
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gemma_serve.engine.block_manager import max_blocks_held
from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.kv_cache import CacheLayout

logger = logging.getLogger(__name__)

_MIB: Final = 1024**2
_GIB: Final = 1024**3

_CPU_CACHE_BYTES: Final = 1 * _GIB
"""Unless the operator says more. Memory is touched only as sequences use it."""

_GPU_MEMORY_SHARE: Final = 0.95
"""Of what is left beside weights and the largest step; the rest goes to fragmentation."""

_CPU_VISION_CACHE_BYTES: Final = 256 * _MIB
_GPU_VISION_CACHE_SHARE: Final = 0.01

_USUAL_CHAT_LEN: Final = 8192
"""Tokens of the chats that the start-up log counts in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What one GPU has to give to the cache of keys and values."""

    free_bytes: int
    """With the weights loaded and nothing else."""
    step_bytes: int
    """What the runner, its recorded steps and the largest step at its peak take."""
    vision_cache_bytes: int = 0
    """What features of images may take here."""
    num_planes: int
    """Planes of the cache that lie here."""


def gpu_cache_bytes(devices: Iterable[DeviceMemory]) -> int:
    """Memory for keys and values over all ``devices``, at least one of which has planes.

    Every block has a part in every plane, so the fullest device decides.
    """
    holding = [device for device in devices if device.num_planes]
    per_plane = min(
        (device.free_bytes - device.step_bytes - device.vision_cache_bytes) // device.num_planes
        for device in holding
    )
    num_planes = sum(device.num_planes for device in holding)
    return max(0, int(per_plane * num_planes * _GPU_MEMORY_SHARE))


def cpu_cache_bytes(layout: CacheLayout, config: EngineConfig, *, max_model_len: int) -> int:
    """A modest size, or what one sequence of ``max_model_len`` tokens needs if that is more."""
    longest = _blocks_held(layout, config, max_model_len)
    return max(_CPU_CACHE_BYTES, longest * layout.bytes_per_block(config.block_size))


def draft_share(
    served: CacheLayout, draft: CacheLayout, config: EngineConfig, *, max_model_len: int
) -> float:
    """Of the memory for keys and values, what a draft model needs to follow every chat."""
    chat_len = min(_USUAL_CHAT_LEN, max_model_len)
    served_bytes, draft_bytes = (
        _blocks_held(layout, config, chat_len) * layout.bytes_per_block(config.block_size)
        for layout in (served, draft)
    )
    return draft_bytes / (served_bytes + draft_bytes)


def vision_cache_bytes(config: EngineConfig, *, gpu_bytes: int | None) -> int:
    """Memory for features of images. ``gpu_bytes``: all that the GPU has; ``None`` on a CPU."""
    if config.vision_cache_memory_bytes is not None:
        return config.vision_cache_memory_bytes
    if gpu_bytes is None:
        return _CPU_VISION_CACHE_BYTES
    return int(gpu_bytes * _GPU_VISION_CACHE_SHARE)


def num_cache_blocks(
    layout: CacheLayout, config: EngineConfig, *, budget_bytes: int, max_model_len: int
) -> int:
    """Blocks in ``budget_bytes``.

    Raises ``ConfigurationError`` if one sequence of ``max_model_len`` tokens does not fit.
    """
    bytes_per_block = layout.bytes_per_block(config.block_size)
    longest = _blocks_held(layout, config, max_model_len)
    num_blocks = budget_bytes // bytes_per_block
    if num_blocks < longest:
        raise ConfigurationError(
            f"The KV cache has {budget_bytes / _MIB:.1f} MiB, but one sequence of max_model_len="
            f"{max_model_len} tokens needs {longest * bytes_per_block / _MIB:.1f} MiB: at most "
            f"{max_tokens_held(layout, config, num_blocks)} tokens fit. Lower max_model_len, raise "
            "kv_cache_memory, or use a larger or another GPU."
        )
    return num_blocks


def log_capacity(
    layout: CacheLayout, config: EngineConfig, num_blocks: int, *, max_model_len: int
) -> None:
    """One line for the operator: how much there is, and how many chats it is good for."""
    chat_len = min(_USUAL_CHAT_LEN, max_model_len)
    num_chats = num_chats_held(layout, config, num_blocks, chat_len)
    logger.info(
        "KV cache: %.2f GiB, %d blocks of %d tokens: holds %d chats of %d tokens (%d tokens), "
        "or one of %d",
        num_blocks * layout.bytes_per_block(config.block_size) / _GIB,
        num_blocks,
        config.block_size,
        num_chats,
        chat_len,
        num_chats * chat_len,
        max_tokens_held(layout, config, num_blocks),
    )


def num_chats_held(
    layout: CacheLayout, config: EngineConfig, num_blocks: int, num_tokens: int
) -> int:
    """Sequences of ``num_tokens`` tokens that can decode while the last one's prompt comes in.

    A decoding sequence holds less than one whose prompt is computed: its windows are behind it.
    """
    arriving = _blocks_held(layout, config, num_tokens)
    decoding = max_blocks_held(
        num_tokens, chunk_size=1, block_size=config.block_size, windows=layout.windows
    )
    return 0 if num_blocks < arriving else 1 + (num_blocks - arriving) // decoding


def max_tokens_held(layout: CacheLayout, config: EngineConfig, num_blocks: int) -> int:
    """The longest sequence that ``num_blocks`` hold, in tokens."""
    lengths = range(num_blocks * config.block_size + 1)
    return bisect_right(lengths, num_blocks, key=lambda n: _blocks_held(layout, config, n)) - 1


def _blocks_held(layout: CacheLayout, config: EngineConfig, num_tokens: int) -> int:
    return max_blocks_held(
        num_tokens,
        chunk_size=config.prefill_chunk_size,
        block_size=config.block_size,
        windows=layout.windows,
    )
