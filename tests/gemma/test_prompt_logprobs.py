"""Log-likelihoods of prompts equal transformers' own: what lm-eval measures."""

from dataclasses import replace

import pytest
import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.generation import FinishReason, GenerationDelta, SampledLogprobs, SamplingParams
from tests.gemma.harness import loaded, prompt, transformers_logits
from tests.tiny import tiny_text_model

NUM_TOP = 3


@pytest.fixture(scope="module")
def tiny() -> LoadedGemma:
    return loaded(tiny_text_model())


def make_engine(tiny: LoadedGemma, *, chunk_size: int = 512) -> Engine:
    config = EngineConfig(
        max_model_len=400,
        prefill_chunk_size=chunk_size,
    )
    return build_engine(tiny, config)


def run(engine: Engine, *requests: EngineRequest) -> dict[tuple[int, int], GenerationDelta]:
    """Everything that each sequence brought, by request and index."""
    for request in requests:
        engine.add(request)
    merged: dict[tuple[int, int], GenerationDelta] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            for delta in output.deltas:
                key = (output.key, delta.index)
                merged[key] = merged[key] + delta if key in merged else delta
    return merged


def scored(inputs: PromptInputs, *, key: int = 0, max_tokens: int = 1, n: int = 1) -> EngineRequest:
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, prompt_logprobs=NUM_TOP, ignore_eos=True
    )
    return EngineRequest(key=key, prompt=inputs, sampling=sampling, n=n)


def assert_equals_transformers(
    tiny: LoadedGemma, inputs: PromptInputs, told: tuple[SampledLogprobs, ...]
) -> None:
    reference = transformers_logits(tiny.model, inputs).log_softmax(dim=-1)
    assert [position.chosen.token_id for position in told] == list(inputs.token_ids[1:])
    for row, position in zip(reference, told, strict=False):
        assert position.chosen.logprob == pytest.approx(
            row[position.chosen.token_id].item(), abs=1e-4
        )
        best = row.topk(NUM_TOP)
        assert [top.token_id for top in position.top] == best.indices.tolist()
        assert [top.logprob for top in position.top] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


@pytest.mark.parametrize("chunk_size", [7, 64, 512])
@pytest.mark.parametrize("num_tokens", [2, 16, 130])
def test_prompt_logprobs_equal_transformers_own(
    tiny: LoadedGemma, num_tokens: int, chunk_size: int
) -> None:
    inputs = prompt(num_tokens)
    result = run(make_engine(tiny, chunk_size=chunk_size), scored(inputs))[0, 0]
    assert_equals_transformers(tiny, inputs, result.prompt_logprobs)


def test_prompt_of_one_token_has_none(tiny: LoadedGemma) -> None:
    assert run(make_engine(tiny), scored(prompt(1)))[0, 0].prompt_logprobs == ()


def test_most_probable_token_has_exactly_the_logprob_of_the_first_alternative(
    tiny: LoadedGemma,
) -> None:
    """lm-eval calls a continuation greedy when these two are equal."""
    told = run(make_engine(tiny), scored(prompt(200)))[0, 0].prompt_logprobs
    greedy = [p for p in told if p.chosen.token_id == p.top[0].token_id]
    assert all(p.chosen.logprob == p.top[0].logprob for p in greedy)
    assert all(p.chosen.logprob <= p.top[0].logprob for p in told)


def test_only_the_first_sequence_of_a_request_carries_them(tiny: LoadedGemma) -> None:
    results = run(make_engine(tiny), scored(prompt(9), n=3, max_tokens=2))
    assert [len(results[0, i].prompt_logprobs) for i in range(3)] == [8, 0, 0]


def test_max_tokens_0_computes_the_prompt_and_says_nothing(tiny: LoadedGemma) -> None:
    inputs = prompt(20)
    result = run(make_engine(tiny), scored(inputs, max_tokens=0, n=2))
    assert (result[0, 0].token_ids, result[0, 0].finish_reason) == ((), FinishReason.LENGTH)
    assert (result[0, 1].token_ids, result[0, 1].finish_reason) == ((), FinishReason.LENGTH)
    assert_equals_transformers(tiny, inputs, result[0, 0].prompt_logprobs)


def test_a_preempted_prompt_is_scored_once(tiny: LoadedGemma) -> None:
    engine = make_engine(tiny, chunk_size=8)
    prompts = [prompt(60, seed=seed) for seed in range(3)]
    for key, inputs in enumerate(prompts):
        engine.add(scored(inputs, key=key, max_tokens=3))
    engine.step()
    engine.step()
    scheduler = engine._scheduler
    scheduler._preempt(scheduler._running[-1])  # as when blocks run out
    results = run(engine)
    for key, inputs in enumerate(prompts):
        assert_equals_transformers(tiny, inputs, results[key, 0].prompt_logprobs)


def test_a_cached_prompt_is_computed_anew_to_be_scored(tiny: LoadedGemma) -> None:
    """The logits of what a prefix hit leaves out would be nowhere."""
    engine, inputs = make_engine(tiny), prompt(130)
    plain = EngineRequest(key=0, prompt=inputs, sampling=SamplingParams(max_tokens=1))
    run(engine, plain)
    for key in (1, 2):
        result = run(engine, scored(inputs, key=key))[key, 0]
        assert result.cached_tokens == 0
        assert_equals_transformers(tiny, inputs, result.prompt_logprobs)
    assert run(engine, replace(plain, key=3))[3, 0].cached_tokens == 128


def test_siblings_of_a_scored_sequence_share_its_prompt(tiny: LoadedGemma) -> None:
    results = run(make_engine(tiny), scored(prompt(130), n=3))
    assert [results[0, index].cached_tokens for index in range(3)] == [0, 128, 128]


def test_scoring_leaves_what_is_said_as_it_is(tiny: LoadedGemma) -> None:
    inputs = prompt(40)
    plain = EngineRequest(
        key=0,
        prompt=inputs,
        sampling=SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    )
    with torch.inference_mode():
        expected = run(make_engine(tiny), plain)[0, 0].token_ids
        assert run(make_engine(tiny), scored(inputs, max_tokens=8))[0, 0].token_ids == expected
