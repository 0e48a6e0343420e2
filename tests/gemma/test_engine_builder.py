"""What a whole engine over a tiny model does at its limits."""

import logging
from collections.abc import Sequence as Seq
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma import engine_builder
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.kv_cache import KVCache
from gemma_serve.generation import SamplingParams
from tests.gemma.harness import loaded, prompt
from tests.tiny import tiny_text_model, tiny_vision_model

CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, prefill_chunk_size=16, block_size=4)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def completions(engine: Engine, prompts: list[PromptInputs]) -> dict[int, tuple[int, ...]]:
    """The completion of each prompt, or the part of it that came before a failure."""
    token_ids: dict[int, tuple[int, ...]] = {}
    for key, inputs in enumerate(prompts):
        engine.add(EngineRequest(key=key, prompt=inputs, sampling=GREEDY))
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                token_ids[output.key] = token_ids.get(output.key, ()) + delta.token_ids
    return token_ids


def out_of_memory_in(step: int) -> type[SdpaAttention]:
    """Attention for which a device has not enough memory once, when it has written all keys."""

    class OutOfMemoryOnce(SdpaAttention):
        num_steps = 0

        def __init__(self, cache: KVCache, chunks: Seq[Chunk]) -> None:
            super().__init__(cache, chunks)
            OutOfMemoryOnce.num_steps += 1

        def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
            if (self.num_steps, layer) == (step, 5):
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
            return super()._attend(layer, query, scale)

    return OutOfMemoryOnce


@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_survivors_of_an_out_of_memory_say_what_they_would_have_said(
    step: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of prompts and of answers; keys and values are written again as they were."""
    gemma = loaded(tiny_vision_model())
    prompts = [prompt(9, seed=1), prompt(30, images=[(4, 8)], seed=2), prompt(5, seed=3)]
    undisturbed = completions(build_engine(gemma, CONFIG), prompts)
    engine = build_engine(gemma, CONFIG, out_of_memory_in(step))
    with caplog.at_level(logging.CRITICAL):
        disturbed = completions(engine, prompts)
    num_complete = sum(len(token_ids) == 8 for token_ids in disturbed.values())
    assert num_complete == 2
    for key, token_ids in disturbed.items():
        assert token_ids == undisturbed[key][: len(token_ids)]
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_a_cache_larger_than_the_machine_is_refused_with_its_size() -> None:
    config = EngineConfig(max_model_len=64, kv_cache_memory_bytes=1 << 60)
    with pytest.raises(
        ConfigurationError, match=r"1099511627776\.0 MiB, which are not free: lower"
    ):
        build_engine(loaded(tiny_text_model()), config)


def test_start_up_says_once_what_the_cache_holds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gemma_serve"):
        build_engine(loaded(tiny_text_model()), CONFIG)
    said = [message[:31] for message in caplog.messages if not message.startswith("attention")]
    assert said == ["KV cache: 1.00 GiB, 1048576 blo"]


def test_fp8_cache_holds_twice_the_blocks_in_the_same_memory() -> None:
    whole = EngineConfig(max_model_len=64, block_size=4, kv_cache_memory_bytes=1_000_000)
    halved = replace(whole, kv_cache_dtype="fp8")
    first, second = (
        build_engine(loaded(tiny_text_model(dtype=torch.bfloat16)), config)
        for config in (whole, halved)
    )
    assert second.stats.num_blocks == pytest.approx(2 * first.stats.num_blocks, abs=1)


def test_fp8_cache_answers() -> None:
    config = EngineConfig(max_model_len=64, block_size=4, kv_cache_dtype="fp8")
    engine = build_engine(loaded(tiny_text_model()), config)
    assert [len(c) for c in completions(engine, [prompt(20), prompt(30)]).values()] == [8, 8]


def test_fp8_cache_is_refused_for_attention_that_does_not_read_it() -> None:
    class OwnKernel(SdpaAttention):
        reads_fp8 = False

    with pytest.raises(ConfigurationError, match="kv_cache_dtype: fp8 is not read by OwnKernel"):
        build_engine(
            loaded(tiny_text_model()), EngineConfig(kv_cache_dtype="fp8"), attention=OwnKernel
        )


def test_prompts_are_limited_beside_answers_where_the_operator_says_so() -> None:
    config = EngineConfig(max_model_len=64, kv_cache_memory_bytes=2**20)
    assert build_engine(loaded(tiny_text_model()), config)._scheduler._prefill_budget is None
    limited = replace(config, max_prefill_slowdown=2.0)
    budget = build_engine(loaded(tiny_text_model()), limited)._scheduler._prefill_budget
    assert budget is not None
    for num_prompt_tokens, duration_s in ((0, 0.01),) * 4 + ((512, 0.06),):
        budget.observe(num_decoding=8, num_prompt_tokens=num_prompt_tokens, duration_s=duration_s)
    assert budget.tokens(num_decoding=8, num_waiting=1) == 102


@pytest.mark.parametrize(
    ("device", "config", "expected"),
    [
        ("cuda", EngineConfig(), True),
        ("cuda", EngineConfig(enforce_eager=True), False),
        ("cuda", EngineConfig(speculation="prompt_lookup"), False),
        ("cpu", EngineConfig(), False),
    ],
    ids=["GPU", "eager", "speculating", "CPU"],
)
def test_the_engine_runs_ahead_of_a_gpu_that_it_need_not_wait_for(
    device: str, config: EngineConfig, expected: bool
) -> None:
    gemma = loaded(tiny_text_model())
    weight = SimpleNamespace(device=torch.device(device))  # there may be no such device here
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    somewhere = replace(gemma, model=cast(Any, model))
    assert engine_builder._runs_ahead(somewhere, config) is expected
