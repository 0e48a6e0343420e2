"""How much memory this machine's devices have for the caches beside a loaded model."""

from collections.abc import Callable

import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.cache_sizing import (
    DeviceMemory,
    cpu_cache_bytes,
    draft_share,
    gpu_cache_bytes,
    vision_cache_bytes,
)
from gemma_serve.gemma.kv_cache import CacheLayout
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.out_of_memory import memory_errors
from gemma_serve.gemma.profiling import largest_steps, measure_gpus


def vision_cache_budget(gemma: LoadedGemma, config: EngineConfig) -> int:
    """Bytes for features of images; they lie where the language model begins."""
    if gemma.vision is None:
        return 0
    device = _first_device(gemma)
    on_gpu = device.type == "cuda"
    gpu_bytes = torch.cuda.mem_get_info(device)[1] if on_gpu else None
    return vision_cache_bytes(config, gpu_bytes=gpu_bytes)


def kv_cache_budget(
    gemma: LoadedGemma,
    layout: CacheLayout,
    config: EngineConfig,
    *,
    max_model_len: int,
    make_runner: Callable[[], GemmaModelRunner],
) -> int:
    """Bytes for keys and values: the operator's, or what the devices have to give.

    ``make_runner``: over a cache of one block, to run the largest steps on a GPU. Raises
    ``ConfigurationError`` if these do not fit.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if layout.plane_devices[0].type != "cuda":
        return cpu_cache_bytes(layout, config, max_model_len=max_model_len)
    return _gpu_budget(gemma, layout, config, max_model_len, make_runner)


def draft_cache_budget(
    served: CacheLayout, draft: CacheLayout, config: EngineConfig, *, max_model_len: int
) -> int:
    """Bytes for the keys and values of a draft model, whose weights are loaded.

    A part of the operator's, or of what the devices have, so that both caches hold as many chats.
    """
    share = draft_share(served, draft, config, max_model_len=max_model_len)
    if config.kv_cache_memory_bytes is not None:
        return int(config.kv_cache_memory_bytes * share)
    if served.plane_devices[0].type != "cuda":
        return int(cpu_cache_bytes(served, config, max_model_len=max_model_len) * share)
    devices = set(served.plane_devices)
    return int(sum(torch.cuda.mem_get_info(device)[0] for device in devices) * share)


def _gpu_budget(
    gemma: LoadedGemma,
    layout: CacheLayout,
    config: EngineConfig,
    max_model_len: int,
    make_runner: Callable[[], GemmaModelRunner],
) -> int:
    steps = largest_steps(
        config,
        max_model_len=max_model_len,
        windows=layout.windows,
        vocab_size=gemma.model.lm_head.out_features,
        vision=gemma.vision,
    )
    devices = {parameter.device for parameter in gemma.model.parameters()}
    try:
        with memory_errors():
            uses = measure_gpus(make_runner, steps, devices)
    except MemoryError as error:
        raise ConfigurationError(
            f"{gemma.name} fits the GPU, but its largest step does not fit beside it: "
            f"prefill_chunk_size={config.prefill_chunk_size} prompt tokens and max_num_seqs="
            f"{config.max_num_seqs} sequences of max_model_len={max_model_len} tokens. Lower "
            f"these, or use a larger or another GPU. ({error})"
        ) from error
    features = {_first_device(gemma): vision_cache_budget(gemma, config)}
    return gpu_cache_bytes(
        DeviceMemory(
            free_bytes=use.free_bytes,
            step_bytes=use.step_bytes,
            vision_cache_bytes=features.get(device, 0),
            num_planes=layout.plane_devices.count(device),
        )
        for device, use in uses.items()
    )


def _first_device(gemma: LoadedGemma) -> torch.device:
    device: torch.device = gemma.model.get_input_embeddings().weight.device
    return device
