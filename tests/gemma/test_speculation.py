"""Over a real model, too, the text with drafts is the text without."""

from dataclasses import replace

import pytest

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.generation import GenerationDelta, SamplingParams
from tests.engine.builders import FreeDrafts
from tests.engine.test_engine import run
from tests.gemma.harness import loaded, prompt
from tests.tiny import tiny_vision_model

CONFIG = EngineConfig(
    max_model_len=160,
    max_num_seqs=16,
    prefill_chunk_size=8,
    block_size=4,
    kv_cache_memory_bytes=2**22,
    speculation="prompt_lookup",
    num_speculative_tokens=5,
)


def speculating_engine(model: Gemma3Model) -> Engine:
    engine = build_engine(loaded(model), CONFIG)
    let_drafts_be_free(engine)
    return engine


def let_drafts_be_free(engine: Engine) -> None:
    assert engine._scheduler._speculation is not None
    for source in engine._scheduler._speculation._sources:
        source.costs = FreeDrafts()


def repeated(inputs: PromptInputs) -> PromptInputs:
    """The text once more behind itself, its images but once."""
    text = inputs.token_ids[inputs.images[-1].end if inputs.images else 0 :]
    return PromptInputs((*inputs.token_ids, *text, *text), inputs.images)


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(seed=7, allowed_token_ids=(40, 41, 42)),
    "top-k": SamplingParams(seed=7, top_k=3, allowed_token_ids=(40, 41, 42, 43)),
    "penalties": SamplingParams(
        temperature=0.3, seed=7, repetition_penalty=0.8, frequency_penalty=-0.2, logprobs=2
    ),
    "bans": SamplingParams(temperature=0, banned_token_sequences=((7, 8),), min_tokens=9),
}


def completions(
    engine: Engine, sampling: SamplingParams, *, speculation: bool
) -> dict[tuple[int, int], GenerationDelta]:
    sampling = replace(sampling, speculation=speculation, max_tokens=32, ignore_eos=True)
    prompts = [
        repeated(prompt(9, seed=1)),
        repeated(prompt(20, images=[(3, 7), (8, 12)], seed=3)),
    ]
    for key, inputs in enumerate(prompts):
        engine.add(EngineRequest(key=key, prompt=inputs, sampling=sampling))
    return run(engine, max_steps=1000)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_tokens_with_drafts_are_those_without(sampling: SamplingParams) -> None:
    engine = speculating_engine(tiny_vision_model())
    expected = completions(engine, sampling, speculation=False)
    assert engine.stats.num_drafted_tokens == 0
    found = completions(engine, sampling, speculation=True)
    assert {place: delta.token_ids for place, delta in found.items()} == {
        place: delta.token_ids for place, delta in expected.items()
    }
    assert {p: d.text for p, d in found.items()} == {p: d.text for p, d in expected.items()}
    for place, delta in found.items():
        for ours, theirs in zip(delta.logprobs, expected[place].logprobs, strict=True):
            assert ours.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-3)
    stats = engine.stats
    assert stats.num_accepted_tokens > 4
    assert stats.num_free_blocks == stats.num_blocks
