"""A model whose steps begin before the last one's tokens are known says what it says otherwise."""

from collections.abc import Mapping

import pytest

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.gemma import engine_builder
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.generation import GenerationDelta, SamplingParams
from tests.engine.test_engine import run
from tests.gemma.harness import loaded, prompt
from tests.tiny import tiny_vision_model

BYTES_PER_BLOCK = 2 * 2 * 16 * 4 * 4
"""Keys and values of two heads of 16 float32 numbers in one layer, for four tokens."""


def make_engine(model: Gemma3Model, *, num_blocks: int) -> Engine:
    config = EngineConfig(
        max_model_len=96,
        max_num_seqs=4,
        prefill_chunk_size=8,
        block_size=4,
        kv_cache_memory_bytes=num_blocks * BYTES_PER_BLOCK,
    )
    return engine_builder.build_engine(loaded(model), config)


def answers(engine: Engine) -> Mapping[tuple[int, int], GenerationDelta]:
    samplings = (
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=1, top_p=0.9, seed=1, max_tokens=30, logprobs=2),
        SamplingParams(temperature=1, seed=2, repetition_penalty=1.3, max_tokens=40),
        SamplingParams(temperature=1, top_k=5, seed=3, max_tokens=20, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=0),
    )
    for key, sampling in enumerate(samplings):
        images = [(3, 7), (8, 12)] if key % 2 else []
        inputs = prompt(20 + 3 * key, images=images, seed=key)
        engine.add(EngineRequest(key=key, prompt=inputs, sampling=sampling, n=1 + key // 2))
    results = run(engine, max_steps=1000)
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    return results


@pytest.mark.parametrize("num_blocks", [1000, 112], ids=["plenty", "scarce"])
def test_answers_are_the_same(num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vision_model()
    in_turn = make_engine(model, num_blocks=num_blocks)
    monkeypatch.setattr(engine_builder, "_runs_ahead", lambda *_: True)
    ahead = make_engine(model, num_blocks=num_blocks)
    expected, actual = answers(in_turn), answers(ahead)
    assert actual.keys() == expected.keys()
    for place, answer in expected.items():
        assert (actual[place].token_ids, actual[place].text) == (answer.token_ids, answer.text)
        assert actual[place].finish_reason == answer.finish_reason
        for ours, theirs in zip(actual[place].logprobs, answer.logprobs, strict=True):
            assert ours.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-4)
        assert len(actual[place].prompt_logprobs) == len(answer.prompt_logprobs)
