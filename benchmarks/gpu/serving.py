"""One model under its engine: decoding, prompts, prompts that arrive meanwhile, and capacity."""

from collections.abc import Iterator
from statistics import quantiles
from time import perf_counter
from typing import Final

from benchmarks.gpu import work
from benchmarks.gpu.bounds import ModelCosts
from benchmarks.gpu.devices import Ceilings
from benchmarks.gpu.findings import Finding, Target
from benchmarks.gpu.models import engine_config
from benchmarks.gpu.scale import Scale
from gemma_serve.gemma.cache_sizing import num_chats_held
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.kv_cache import CacheLayout
from gemma_serve.gemma.loading import LoadedGemma

_STREAM_TARGETS: Final = {"27b": 0.85, "12b": 0.85, "4b": 0.75}
_PREFILL_TARGET: Final = 0.5
_GAP_TARGET: Final = 2.0
_MIN_ARRIVALS: Final = 2
_SLOWEST_PREFILL: Final = 128
"""Prompt tokens per step beside streams that decode already, at least."""


class ServingMeasurements:
    """Of one model under an engine of its own, which is idle between them."""

    def __init__(
        self,
        label: str,
        size: str,
        gemma: LoadedGemma,
        scale: Scale,
        ceilings: Ceilings,
    ) -> None:
        self.label = label
        self._size = size
        self._scale = scale
        self._ceilings = ceilings
        self._costs = ModelCosts.of(gemma)  # before the engine takes the weights over
        self._config = engine_config(scale)
        self._engine = build_engine(gemma, self._config)
        text_model = gemma.model.get_decoder()
        self._layout = CacheLayout.of(
            text_model.config,
            [layer.input_layernorm.weight.device for layer in text_model.layers],
            text_model.norm.weight.dtype,
        )
        self._vocab_size = gemma.model.lm_head.out_features

    def weights(self) -> Finding:
        return Finding(
            what=f"{self.label} weights of a step",
            value=self._costs.weights_bytes / 2**30,
            unit="GiB",
        )

    def capacity(self) -> Finding:
        length = self._scale.chat_tokens
        return Finding(
            what=f"{self.label} capacity, chats of {length}",
            value=self.num_held(length),
            unit="chats",
        )

    def num_held(self, num_tokens: int) -> int:
        """Sequences of ``num_tokens`` that the cache holds."""
        num_blocks = self._engine.stats.num_blocks
        return num_chats_held(self._layout, self._config, num_blocks, num_tokens)

    def decode(self) -> Iterator[Finding]:
        """At each number of streams that the cache holds."""
        for num_streams in self._scale.num_streams:
            if self.num_held(self._longest_stream(num_streams)) >= num_streams:
                yield self._decode(num_streams)

    def _longest_stream(self, num_streams: int) -> int:
        tokens_per_step = min(self._config.prefill_chunk_size, _SLOWEST_PREFILL)
        waiting = -(-num_streams * self._scale.prompt_tokens // tokens_per_step)
        return self._scale.prompt_tokens + self._scale.decode_steps + waiting + 16

    def _decode(self, num_streams: int) -> Finding:
        streams = self._prompts(num_streams, self._scale.prompt_tokens)
        step_s = work.decode_step_s(self._engine, streams, self._scale.decode_steps)
        context = self._scale.prompt_tokens + self._scale.decode_steps // 2
        bound_s = self._costs.decode_bytes(num_streams, context) / self._ceilings.bytes_per_s
        share = _STREAM_TARGETS.get(self._size) if num_streams == 1 else None
        return Finding(
            what=f"{self.label} decode, {num_streams} streams",
            value=num_streams / step_s,
            unit="tokens/s",
            share=bound_s / step_s,
            target=None if share is None else Target(limit=share),
        )

    def prefill(self) -> Finding:
        """One long prompt, the second time."""
        length = self._scale.long_prompt_tokens
        for token_ids in self._prompts(2, length):
            begin = perf_counter()
            work.add(self._engine, token_ids, 1)
            work.run_until_idle(self._engine)
            elapsed_s = perf_counter() - begin
        flops = self._costs.prefill_flops(length) / elapsed_s
        return Finding(
            what=f"{self.label} prefill of {length}",
            value=length / elapsed_s,
            unit="tokens/s",
            share=flops / self._ceilings.flops,
            target=Target(limit=_PREFILL_TARGET) if self._size in _STREAM_TARGETS else None,
        )

    def arrivals(self) -> Iterator[Finding]:
        """Time between the tokens of streams while one long prompt after another comes in."""
        scale = self._scale
        streams = self._prompts(scale.arrival_streams, scale.prompt_tokens)
        arriving = iter(
            self._prompts(
                scale.arrival_steps // scale.steps_per_arrival + _MIN_ARRIVALS,
                scale.long_prompt_tokens,
            )
        )
        keys = work.start_streams(self._engine, streams, scale.arrival_steps)
        gaps_s = []
        for index in range(scale.arrival_steps):
            if index % scale.steps_per_arrival == 0:
                keys.append(work.add(self._engine, next(arriving), 1))
            begin = perf_counter()
            work.step(self._engine)
            gaps_s.append(perf_counter() - begin)
        work.stop(self._engine, keys)
        percentiles = quantiles(gaps_s, n=100, method="inclusive")
        p50, p99 = percentiles[49], percentiles[98]
        label = f"{self.label} inter-token"
        yield Finding(what=f"{label} p50, prompts arriving", value=p50 * 1000, unit="ms")
        yield Finding(what=f"{label} p99, prompts arriving", value=p99 * 1000, unit="ms")
        yield Finding(
            what=f"{label} p99 over p50",
            value=p99 / p50,
            unit="times",
            target=Target(limit=_GAP_TARGET, direction="at most"),
        )

    def burst(self) -> Finding:
        """As ``peers`` measures the others."""
        requests = self._prompts(self._scale.burst_requests, self._scale.prompt_tokens)
        return Finding(
            what=f"{self.label} burst of {len(requests)}",
            value=work.burst_rate(self._engine, requests, self._scale.burst_tokens),
            unit="tokens/s",
        )

    def _prompts(self, number: int, length: int) -> list[tuple[int, ...]]:
        return work.prompts(number, length, self._vocab_size)
