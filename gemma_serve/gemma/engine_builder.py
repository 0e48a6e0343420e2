"""Puts cache, scheduler, sampler and runner of one loaded model together."""

from collections.abc import Callable

import torch

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, Vocabulary
from gemma_serve.engine.sampler import Sampler
from gemma_serve.engine.scheduler import Scheduler
from gemma_serve.engine.speculation import Speculation
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.device import DeviceBackend
from gemma_serve.gemma.attention.selection import (
    AttentionNeeds,
    CacheAttention,
    SelectedAttention,
    select_attention,
)
from gemma_serve.gemma.cache_budget import kv_cache_budget, vision_cache_budget
from gemma_serve.gemma.cache_sizing import log_capacity, num_cache_blocks
from gemma_serve.gemma.cuda_graphs import GraphRecorder
from gemma_serve.gemma.decode_steps import DecodeSteps
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.forbidden_tokens import forbidden_token_ids
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.out_of_memory import memory_errors
from gemma_serve.gemma.projections import activation_dtype
from gemma_serve.gemma.quantization.fp8 import FP8
from gemma_serve.gemma.token_bytes import control_token_names, token_bytes


def build_engine(
    gemma: LoadedGemma, config: EngineConfig, attention: AttentionFactory | None = None
) -> Engine:
    """Put cache, scheduler, sampler and runner of one loaded model together.

    ``attention``: instead of what ``config`` names. Raises ``ConfigurationError`` if the devices
    cannot hold what ``config`` asks for.
    """
    _check_images_fit(gemma, config)
    longest = max_model_len(gemma, config)
    layout = _cache_layout(gemma, config)
    vocab_size = gemma.model.lm_head.out_features
    sampler = Sampler(
        vocab_size=vocab_size,
        forbidden_token_ids=forbidden_token_ids(gemma.tokenizer, vocab_size),
        device=gemma.model.lm_head.weight.device,
    )
    vision_bytes = vision_cache_budget(gemma, config)
    selected = _select_attention(gemma, layout, config, attention)
    decoder = Decoder(gemma.model, "triton" if selected.uses_triton else "torch")

    def make_runner(num_blocks: int) -> GemmaModelRunner:
        cache = KVCache(layout, num_blocks=num_blocks, block_size=config.block_size)
        of_cache = selected.over(cache)
        return GemmaModelRunner(
            gemma,
            decoder,
            cache,
            sampler,
            of_cache.begin,
            vision_cache_bytes=vision_bytes,
            decode_steps=_decode_steps(gemma, decoder, of_cache.backend, config),
        )

    budget = kv_cache_budget(
        gemma, layout, config, max_model_len=longest, make_runner=lambda: make_runner(1)
    )
    num_blocks = num_cache_blocks(layout, config, budget_bytes=budget, max_model_len=longest)
    runner = _with_room(lambda: make_runner(num_blocks), budget)
    runner.record_decode_steps()
    log_capacity(layout, config, num_blocks, max_model_len=longest)
    block_manager = BlockManager(
        num_blocks=num_blocks, block_size=config.block_size, windows=layout.windows
    )
    speculation = _speculation(config, vocab_size)
    return Engine(
        runner=runner,
        scheduler=Scheduler(
            block_manager=block_manager,
            max_num_seqs=config.max_num_seqs,
            prefill_chunk_size=config.prefill_chunk_size,
            speculation=speculation,
        ),
        block_manager=block_manager,
        vocabulary=Vocabulary(
            token_bytes=token_bytes(gemma.tokenizer, vocab_size),
            eos_token_ids=gemma.eos_token_ids,
            stop_strings=gemma.stop_strings,
            control_token_names=control_token_names(gemma.tokenizer),
        ),
        max_model_len=longest,
        enable_prefix_cache=config.enable_prefix_cache,
        speculation=speculation,
    )


def max_model_len(gemma: LoadedGemma, config: EngineConfig) -> int:
    """Tokens of prompt and completion together: the operator's limit, or the model's."""
    if config.max_model_len is None:
        return gemma.max_model_len
    if config.max_model_len > gemma.max_model_len:
        raise ConfigurationError(
            f"max_model_len is {config.max_model_len}, but {gemma.name} was trained for "
            f"{gemma.max_model_len} tokens."
        )
    return config.max_model_len


def _speculation(config: EngineConfig, vocab_size: int) -> Speculation | None:
    if config.speculation == "off":
        return None
    return Speculation(
        max_drafts=config.num_speculative_tokens,
        max_rows=config.max_sampled_rows,
        vocab_size=vocab_size,
    )


def _cache_layout(gemma: LoadedGemma, config: EngineConfig) -> CacheLayout:
    text_model = gemma.model.get_decoder()
    layer_devices = [layer.input_layernorm.weight.device for layer in text_model.layers]
    computed = text_model.norm.weight.dtype  # quantised weights have others
    dtype = FP8 if config.kv_cache_dtype == "fp8" else computed
    return CacheLayout.of(text_model.config, layer_devices, dtype)


def _select_attention(
    gemma: LoadedGemma,
    layout: CacheLayout,
    config: EngineConfig,
    attention: AttentionFactory | None,
) -> SelectedAttention:
    if attention is not None:
        _check_cache_is_read(attention, config)
        return SelectedAttention(lambda _: CacheAttention(attention))
    needs = AttentionNeeds(
        layout=layout,
        num_heads=gemma.model.get_decoder().config.num_attention_heads,
        dtype=_activation_dtype(gemma),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len(gemma, config),
    )
    return select_attention(config.attention, needs)


def _activation_dtype(gemma: LoadedGemma) -> torch.dtype:
    norm = gemma.model.get_decoder().norm.weight  # quantised weights have other types
    return activation_dtype(norm.dtype, norm.device)


def _decode_steps(
    gemma: LoadedGemma, decoder: Decoder, backend: DeviceBackend | None, config: EngineConfig
) -> DecodeSteps | None:
    """Where they can be recorded: on one GPU, by kernels that read their step from its memory."""
    if backend is None or config.enforce_eager:
        return None
    devices = {parameter.device for parameter in gemma.model.get_decoder().parameters()}
    if len(devices) > 1 or (device := devices.pop()).type != "cuda":
        return None
    return DecodeSteps(
        decoder,
        gemma.model.get_decoder().embed_tokens,
        backend,
        max_num_tokens=config.max_sampled_rows,
        record=GraphRecorder(device),
    )


def _with_room(make_runner: Callable[[], GemmaModelRunner], num_bytes: int) -> GemmaModelRunner:
    try:
        with memory_errors():
            return make_runner()
    except MemoryError as error:
        raise ConfigurationError(
            f"The KV cache should have {num_bytes / 2**20:.1f} MiB, which are not free: lower "
            f"kv_cache_memory, or leave it out to take what there is. ({error})"
        ) from error


def _check_cache_is_read(attention: AttentionFactory, config: EngineConfig) -> None:
    if config.kv_cache_dtype == "fp8" and not getattr(attention, "reads_fp8", False):
        name = getattr(attention, "__name__", "the attention")
        raise ConfigurationError(
            f"kv_cache_dtype: fp8 is not read by {name}, which computes attention here: leave it "
            "out"
        )


def _check_images_fit(gemma: LoadedGemma, config: EngineConfig) -> None:
    if gemma.vision and config.prefill_chunk_size < gemma.vision.tokens_per_view:
        raise ConfigurationError(
            f"prefill_chunk_size is {config.prefill_chunk_size}, but an image of {gemma.name} has "
            f"{gemma.vision.tokens_per_view} tokens, which are computed together."
        )
