"""Tokens that a client forbids, for a while or for good."""

import pytest
import torch

from gemma_serve.engine.restrictions import Restrictions
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.generation import SamplingParams

EOS = 1


def restrictions(**fields: object) -> Restrictions:
    restricted = Restrictions.of(SamplingParams(**fields), (EOS,))  # type: ignore[arg-type]
    assert restricted is not None
    return restricted


def say(sampling: SamplingParams, num_tokens: int) -> list[int]:
    """Greedy tokens of a model that likes lower ids better."""
    sampler = Sampler(vocab_size=10, forbidden_token_ids=(0,), device=torch.device("cpu"))
    state = SamplingState(sampling, seed=0, prompt_token_ids=(), ending_token_ids=(EOS,))
    said = []
    for _ in range(num_tokens):
        (sampled,) = sampler.sample(-torch.arange(10.0).unsqueeze(0), [state])
        assert sampled.token_id is not None
        state.append(sampled.token_id)
        said.append(sampled.token_id)
    return said


def test_nothing_asked_is_nothing_restricted() -> None:
    assert Restrictions.of(SamplingParams(), (EOS,)) is None


def test_ending_tokens_are_banned_until_there_are_enough_tokens() -> None:
    restricted = restrictions(min_tokens=2)
    assert restricted.banned_token_ids == [EOS]
    restricted.append(5)
    assert restricted.banned_token_ids == [EOS]
    restricted.append(5)
    assert restricted.banned_token_ids == []


def test_last_token_of_a_banned_sequence_is_banned_after_the_others() -> None:
    restricted = restrictions(banned_token_sequences=((7,), (5, 6), (5, 5, 8)))
    banned = []
    for token_id in (5, 5, 6, 5):
        restricted.append(token_id)
        banned.append(restricted.banned_token_ids)
    assert banned == [[7, 6], [7, 6, 8], [7], [7, 6]]


def test_sampler_obeys_each_restriction() -> None:
    greedy = SamplingParams(temperature=0)
    assert say(greedy, 3) == [1, 1, 1]
    assert say(SamplingParams(temperature=0, min_tokens=2), 3) == [2, 2, 1]
    assert say(SamplingParams(temperature=0, allowed_token_ids=(4, 6)), 2) == [4, 4]
    banned = SamplingParams(temperature=0, banned_token_sequences=((1,), (2, 2)))
    assert say(banned, 4) == [2, 3, 2, 3]


def test_a_forbidden_token_stays_forbidden_where_it_is_allowed() -> None:
    assert say(SamplingParams(temperature=0, allowed_token_ids=(0, 6)), 1) == [6]


def test_a_restricted_row_leaves_its_neighbours_alone() -> None:
    sampler = Sampler(vocab_size=10, forbidden_token_ids=(), device=torch.device("cpu"))
    states = [
        SamplingState(
            SamplingParams(temperature=0, allowed_token_ids=ids), seed=0, prompt_token_ids=()
        )
        for ids in (None, (5,), None)
    ]
    sampled = sampler.sample(-torch.arange(10.0).repeat(3, 1), states)
    assert [token.token_id for token in sampled] == [0, 5, 0]


def test_logprobs_are_the_models_own_whatever_is_banned() -> None:
    sampler = Sampler(vocab_size=4, forbidden_token_ids=(), device=torch.device("cpu"))
    sampling = SamplingParams(temperature=0, allowed_token_ids=(2,), logprobs=1)
    state = SamplingState(sampling, seed=0, prompt_token_ids=())
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    expected = logits.log_softmax(dim=1)[0].tolist()
    (sampled,) = sampler.sample(logits, [state])
    assert [token_id for token_id, _ in sampled.logprobs] == [2, 0]
    assert [logprob for _, logprob in sampled.logprobs] == pytest.approx([expected[2], expected[0]])
