"""Makes runners of one loaded model, over caches of any size."""

import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.device import DeviceBackend
from gemma_serve.gemma.attention.selection import (
    AttentionNeeds,
    CacheAttention,
    SelectedAttention,
    select_attention,
)
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
from gemma_serve.gemma.token_feed import TokenFeed


class RunnerFactory:
    """Takes the weights of one model over, so there is one of it for each model."""

    def __init__(
        self,
        gemma: LoadedGemma,
        config: EngineConfig,
        *,
        max_model_len: int,
        vision_cache_bytes: int = 0,
        attention: AttentionFactory | None = None,
    ) -> None:
        """``attention``: instead of what ``config`` names."""
        self.vocab_size: int = gemma.model.lm_head.out_features
        self.layout = _cache_layout(gemma, config)
        self._gemma = gemma
        self._config = config
        self._vision_cache_bytes = vision_cache_bytes
        self._sampler = Sampler(
            vocab_size=self.vocab_size,
            forbidden_token_ids=forbidden_token_ids(gemma.tokenizer, self.vocab_size),
            device=gemma.model.lm_head.weight.device,
        )
        self._attention = _select_attention(gemma, self.layout, config, max_model_len, attention)
        self._decoder = Decoder(gemma.model, self._attention.kernels)

    def make(self, num_blocks: int) -> GemmaModelRunner:
        """A runner over a cache of its own; its decode steps are not recorded yet."""
        cache = KVCache(self.layout, num_blocks=num_blocks, block_size=self._config.block_size)
        of_cache = self._attention.over(cache)
        embedding = self._gemma.model.get_decoder().embed_tokens
        token_feed = TokenFeed(
            max_rows=self._config.max_sampled_rows, device=embedding.weight.device
        )
        return GemmaModelRunner(
            self._gemma,
            self._decoder,
            cache,
            self._sampler,
            of_cache.begin,
            token_feed,
            vision_cache_bytes=self._vision_cache_bytes,
            decode_steps=self._decode_steps(of_cache.backend, token_feed),
        )

    def make_for_serving(self, num_blocks: int) -> GemmaModelRunner:
        """The one that stays. Raises ``ConfigurationError`` if memory does not suffice."""
        try:
            with memory_errors():
                runner = self.make(num_blocks)
        except MemoryError as error:
            num_bytes = num_blocks * self.layout.bytes_per_block(self._config.block_size)
            raise ConfigurationError(
                f"The KV cache should have {num_bytes / 2**20:.1f} MiB, which are not free: lower "
                f"kv_cache_memory, or leave it out to take what there is. ({error})"
            ) from error
        runner.record_decode_steps()
        return runner

    def _decode_steps(
        self, backend: DeviceBackend | None, token_feed: TokenFeed
    ) -> DecodeSteps | None:
        """Where they can be recorded: on one GPU, by kernels that read their step from its
        memory."""
        if backend is None or self._config.enforce_eager:
            return None
        text_model = self._gemma.model.get_decoder()
        devices = {parameter.device for parameter in text_model.parameters()}
        if len(devices) > 1 or (device := devices.pop()).type != "cuda":
            return None
        return DecodeSteps(
            self._decoder,
            lambda names: text_model.embed_tokens(token_feed.token_ids(names)),
            backend,
            max_num_tokens=self._config.max_sampled_rows,
            record=GraphRecorder(device),
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
    max_model_len: int,
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
        max_model_len=max_model_len,
    )
    return select_attention(config.attention, needs)


def _activation_dtype(gemma: LoadedGemma) -> torch.dtype:
    norm = gemma.model.get_decoder().norm.weight  # quantised weights have other types
    return activation_dtype(norm.dtype, norm.device)


def _check_cache_is_read(attention: AttentionFactory, config: EngineConfig) -> None:
    if config.kv_cache_dtype == "fp8" and not getattr(attention, "reads_fp8", False):
        name = getattr(attention, "__name__", "the attention")
        raise ConfigurationError(
            f"kv_cache_dtype: fp8 is not read by {name}, which computes attention here: leave it "
            "out"
        )
