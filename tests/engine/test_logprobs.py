"""What the sampler and the engine tell about probabilities."""

import math

import pytest
import torch

from gemma_serve.engine.sampling.logprobs import TokenLogprobs
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.generation import (
    GenerationDelta,
    SampledLogprobs,
    SamplingParams,
    TokenLogprob,
)
from tests.engine.builders import SpellingRunner, make_engine, make_request
from tests.engine.test_sampler import make_sampler, random_logits


def sample(
    sampler: Sampler, logits: torch.Tensor, *params: SamplingParams
) -> list[tuple[int | None, TokenLogprobs]]:
    states = [SamplingState(p, seed=0, prompt_token_ids=()) for p in params]
    sampled = sampler.sample(logits.clone(), states)
    return [(token.token_id, token.logprobs) for token in sampled]


@pytest.mark.parametrize("vocab_size", [50, 4096, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own_whatever_changes_the_logits(
    vocab_size: int, dtype: torch.dtype
) -> None:
    logits = random_logits(9, vocab_size).to(dtype)
    expected = logits.double().log_softmax(dim=1)
    changed = SamplingParams(
        logprobs=5, temperature=0.3, top_k=3, logit_bias=((7, 30.0),), presence_penalty=2.0
    )
    for row, (token_id, logprobs) in enumerate(
        sample(make_sampler(vocab_size, forbidden=[1, 2]), logits, *[changed] * 9)
    ):
        told_ids, told = [i for i, _ in logprobs], [logprob for _, logprob in logprobs]
        assert told_ids[0] == token_id
        assert told == pytest.approx(expected[row, told_ids].tolist(), abs=1e-5)
        assert told[1:] == pytest.approx(expected[row].topk(5).values.tolist(), abs=1e-5)


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    params = [SamplingParams(logprobs=count) for count in (None, 0, 3, None, 20)]
    sampled = sample(make_sampler(4096), random_logits(5, 4096), *params)
    assert [len(logprobs) for _, logprobs in sampled] == [0, 1, 4, 0, 21]


def test_alternatives_end_with_the_vocabulary() -> None:
    params = SamplingParams(logprobs=20)
    ((_, logprobs),) = sample(make_sampler(6), random_logits(1, 6), params)
    assert sorted(token_id for token_id, _ in logprobs[1:]) == [0, 1, 2, 3, 4, 5]


def test_logprobs_change_no_choice() -> None:
    logits = random_logits(4, 4096)
    with_logprobs = sample(make_sampler(4096), logits, *[SamplingParams(logprobs=2)] * 4)
    without = sample(make_sampler(4096), logits, *[SamplingParams()] * 4)
    assert [i for i, _ in with_logprobs] == [i for i, _ in without]


@pytest.mark.parametrize("odd", [-math.inf, math.nan])
def test_logprob_of_a_token_without_probability_is_finite(odd: float) -> None:
    logits = torch.tensor([[1.0, odd, 1.0, odd]])
    ((_, logprobs),) = sample(make_sampler(4), logits, SamplingParams(logprobs=4))
    assert all(math.isfinite(logprob) and logprob <= 0 for _, logprob in logprobs)
    if odd == -math.inf:
        assert [token_id for token_id, _ in logprobs[1:]] == [0, 2, 1, 3]
        assert [logprob for _, logprob in logprobs[3:]] == [-9999.0, -9999.0]


def test_engine_tells_the_bytes_of_sampled_and_most_probable_tokens() -> None:
    runner = SpellingRunner("h\xc3", logprobs=((0xC3, -0.5), (ord("h"), -2.0)))
    engine = make_engine(runner)
    engine.add(make_request(max_tokens=1))
    ((delta,),) = [output.deltas for output in engine.step()]
    top = (TokenLogprob(0xC3, -0.5, b"\xc3"), TokenLogprob(ord("h"), -2.0, b"h"))
    assert delta.logprobs == (SampledLogprobs(TokenLogprob(ord("h"), -1.0, b"h"), top),)


def test_merged_deltas_keep_logprobs_beside_their_tokens() -> None:
    def delta(token_id: int) -> GenerationDelta:
        of_token = SampledLogprobs(TokenLogprob(token_id, -1.0, b"x"), ())
        return GenerationDelta(0, "x", (token_id,), logprobs=(of_token,))

    merged = delta(4) + delta(5)
    assert merged.token_ids == (4, 5)
    assert [of_token.chosen.token_id for of_token in merged.logprobs] == [4, 5]
