import logging
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.generation import SamplingParams

LARGEST_UNIFORM = 1 - 2.0**-53
VOCAB_SIZES = [50, 4096, 4100]
"""Sorted whole; searched in slices; searched in one slice."""

EVERY_WAY = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=2.0),
    SamplingParams(top_k=7),
    SamplingParams(top_k=64, top_p=0.95),
    SamplingParams(top_k=600, min_p=0.01),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.99, temperature=1.7),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.6, top_k=40, top_p=0.8, min_p=0.05),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(top_k=20, presence_penalty=1.5, frequency_penalty=-0.5),
    SamplingParams(temperature=0.0, frequency_penalty=2.0),
    SamplingParams(top_p=0.9, logit_bias=((3, 5.0), (4, -100.0))),
]


class FixedUniform(SamplingState):
    """Lets the test choose the number that chooses the token."""

    def __init__(
        self, sampling: SamplingParams, number: float, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        super().__init__(sampling, seed=0, prompt_token_ids=prompt_token_ids)
        self._number = number

    def uniform(self) -> float:
        return self._number


def make_sampler(vocab_size: int, forbidden: Sequence[int] = ()) -> Sampler:
    return Sampler(vocab_size=vocab_size, forbidden_token_ids=forbidden, device=torch.device("cpu"))


def sample_ids(sampler: Sampler, logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """The token ids alone, where there is one for every row."""
    token_ids = [token.token_id for token in sampler.sample(logits, states)]
    return [token_id for token_id in token_ids if token_id is not None]


def random_logits(num_seqs: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_seqs, vocab_size, generator=generator) * scale


def sample_one(logits: Tensor, sampling: SamplingParams, number: float = 0.5) -> int:
    """Sample from one row, ``[vocab_size]``."""
    sampler = make_sampler(len(logits))
    return sample_ids(sampler, logits[None].clone(), [FixedUniform(sampling, number)])[0]


def distribution(
    logits: Tensor,
    sampling: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    completion: Sequence[int] = (),
    num_draws: int = 800,
) -> Tensor:
    """Share of each token when the unit interval is walked through evenly: exact to a draw."""
    states = []
    for draw in range(num_draws):
        state = FixedUniform(sampling, (draw + 0.5) / num_draws, prompt)
        for token_id in completion:
            state.append(token_id)
        states.append(state)
    token_ids = sample_ids(make_sampler(len(logits)), logits.repeat(num_draws, 1), states)
    return torch.bincount(torch.tensor(token_ids), minlength=len(logits)).double() / num_draws


def reference(logits: Tensor, sampling: SamplingParams, text: Sequence[int] = ()) -> Tensor:
    """The probabilities that transformers samples from."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores: Tensor = processors(torch.tensor([list(text)], dtype=torch.int64), logits[None].float())
    return scores[0].double().softmax(dim=0)


def assert_same_distribution(sampled: Tensor, expected: Tensor, num_draws: int = 800) -> None:
    assert bool(((sampled > 0) <= (expected > 0)).all()), "a token outside the support"
    # An interval of length p holds n * p draws, give or take one.
    assert (sampled - expected).abs().max().item() <= 1.01 / num_draws


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        SamplingParams(top_k=3),
        SamplingParams(top_k=40),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.95, temperature=0.5),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=64, top_p=0.95),
        SamplingParams(temperature=1.5, top_k=30, top_p=0.9, min_p=0.1),
        SamplingParams(repetition_penalty=1.4, top_k=10),
        SamplingParams(repetition_penalty=0.7),
    ],
)
def test_distribution_is_that_of_transformers(vocab_size: int, sampling: SamplingParams) -> None:
    logits = random_logits(1, vocab_size)[0]
    prompt, completion = [5, 9, 9, 11], [int(logits.argmax()), 5]
    sampled = distribution(logits, sampling, prompt=prompt, completion=completion)
    assert_same_distribution(sampled, reference(logits, sampling, prompt + completion))


@pytest.mark.parametrize("sampling", [SamplingParams(top_p=0.97), SamplingParams(min_p=0.5)])
def test_distribution_too_flat_for_the_candidates_is_that_of_transformers(
    sampling: SamplingParams,
) -> None:
    logits = random_logits(1, 4096, scale=0.01)[0]
    assert_same_distribution(distribution(logits, sampling), reference(logits, sampling))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_top_k_keeps_all_tokens_that_equal_the_last_one(vocab_size: int) -> None:
    logits = torch.zeros(vocab_size)
    logits[[1, 40]] = 2.0
    logits[[7, 8, 30]] = 1.0
    sampling = SamplingParams(top_k=3)
    expected = reference(logits, sampling)
    assert expected.nonzero().flatten().tolist() == [1, 7, 8, 30, 40]
    assert_same_distribution(distribution(logits, sampling), expected)


def test_top_k_keeps_more_equals_than_there_are_spare_candidates() -> None:
    logits = torch.full((4096,), -1.0, dtype=torch.bfloat16)
    logits[::8] = 1.0
    sampling = SamplingParams(top_k=5)
    assert_same_distribution(distribution(logits, sampling), reference(logits, sampling))


def test_top_p_prefers_the_lower_id_of_equals() -> None:
    logits = torch.zeros(4096)
    sampled = distribution(logits, SamplingParams(top_p=0.25), num_draws=1024)
    assert sampled.nonzero().flatten().tolist() == list(range(1024))


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=0.0), SamplingParams(top_p=0.0), SamplingParams(top_k=1)],
)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_takes_the_most_probable_token_and_the_lower_id_of_equals(
    vocab_size: int, sampling: SamplingParams
) -> None:
    logits = torch.full((vocab_size,), -5.0)
    logits[[49, 33, vocab_size - 1]] = 3.0
    assert [sample_one(logits, sampling, number) for number in (0, 0.99)] == [33, 33]


def test_presence_and_frequency_penalties_count_the_completion_only() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 0.5])
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    sampled = distribution(logits, sampling, prompt=[2, 2], completion=[0, 1, 1])
    adjusted = torch.tensor([1.0 - 0.75, 2.0 - 1.0, 3.0, 0.5])
    assert_same_distribution(sampled, adjusted.double().softmax(dim=0))


def test_penalties_apply_before_the_bias_and_both_before_the_temperature() -> None:
    logits = torch.tensor([2.0, -1.0, 0.0, 1.0])
    sampling = SamplingParams(
        temperature=0.5, repetition_penalty=2.0, logit_bias=((0, 1.5), (1, 0.5), (2, -1.0))
    )
    sampled = distribution(logits, sampling, prompt=[0, 1])
    adjusted = torch.tensor([2.0 / 2 + 1.5, -1.0 * 2 + 0.5, 0.0 - 1.0, 1.0]) / 0.5
    assert_same_distribution(sampled, adjusted.double().softmax(dim=0))


def test_penalty_too_small_for_bfloat16_still_counts() -> None:
    logits = torch.tensor([20.0, 20.0, 0.0], dtype=torch.bfloat16)
    state = FixedUniform(SamplingParams(temperature=0.0, presence_penalty=0.01), 0.0)
    state.append(0)
    assert sample_ids(make_sampler(3), logits[None], [state]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_of_minus_one_hundred_bans_even_the_only_probable_token(temperature: float) -> None:
    logits = torch.tensor([500.0, 0.0, -500.0])
    sampling = SamplingParams(temperature=temperature, logit_bias=((0, -100.0),))
    assert sample_one(logits, sampling) == 1


@pytest.mark.parametrize("number", [0.0, 0.5, LARGEST_UNIFORM])
@pytest.mark.parametrize("sampling", EVERY_WAY)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_forbidden_tokens_are_never_chosen(
    vocab_size: int, sampling: SamplingParams, number: float
) -> None:
    allowed = [3, 8, 20]
    forbidden = sorted(set(range(vocab_size)) - set(allowed))
    logits = random_logits(1, vocab_size, scale=50.0)
    token_ids = sample_ids(
        make_sampler(vocab_size, forbidden), logits, [FixedUniform(sampling, number)]
    )
    assert token_ids[0] in allowed


@pytest.mark.parametrize("number", [0.0, LARGEST_UNIFORM])
def test_tokens_whose_probability_vanishes_are_never_chosen(number: float) -> None:
    logits = torch.full((4096,), -1e4)
    logits[2000] = 1e4
    for sampling in EVERY_WAY:
        assert sample_one(logits, sampling, number) == 2000


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
@pytest.mark.parametrize("top_k", [None, 5])
def test_tiny_temperature_is_greedy_without_overflow(temperature: float, top_k: int | None) -> None:
    logits = random_logits(1, 4096)[0]
    sampling = SamplingParams(temperature=temperature, top_k=top_k)
    assert sample_one(logits, sampling, 0.999) == int(logits.argmax())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_token_is_the_same_alone_and_next_to_any_other_rows(dtype: torch.dtype) -> None:
    ways = EVERY_WAY * 3
    logits = random_logits(len(ways), 4096).to(dtype)
    states = []
    for row, sampling in enumerate(ways):
        state = SamplingState(sampling, seed=row, prompt_token_ids=range(row * 10, row * 12))
        state.append(row)
        states.append(state)
    sampler = make_sampler(4096, forbidden=[0, 1])
    alone = [
        sample_ids(sampler, logits[row : row + 1].clone(), [state])[0]
        for row, state in enumerate(states)
    ]
    assert sample_ids(sampler, logits.clone(), states) == alone
    assert sample_ids(sampler, logits.flip(0), states[::-1]) == alone[::-1]
    assert len(set(alone)) > 20  # of 42 rows, six of them greedy


def test_same_seed_gives_the_same_tokens_and_another_one_others() -> None:
    sampler = make_sampler(4096)

    def draw(seed: int) -> list[int]:
        state = SamplingState(SamplingParams(), seed=seed, prompt_token_ids=())
        token_ids = []
        for step in range(20):
            token_ids += sample_ids(sampler, random_logits(1, 4096, seed=step), [state])
            state.append(token_ids[-1])
        return token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_seeded_frequencies_follow_the_distribution() -> None:
    num_draws = 4000
    logits = random_logits(1, 50, scale=1.0)
    sampling = SamplingParams(top_k=10)
    states = [SamplingState(sampling, seed=seed, prompt_token_ids=()) for seed in range(num_draws)]
    token_ids = sample_ids(make_sampler(50), logits.repeat(num_draws, 1), states)
    expected = reference(logits[0], sampling) * num_draws
    counts = torch.bincount(torch.tensor(token_ids), minlength=50)
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert counts[~kept].sum().item() == 0
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("sampling", EVERY_WAY)
def test_broken_row_leaves_the_others_alone_and_gets_the_lowest_allowed_id(
    sampling: SamplingParams, caplog: pytest.LogCaptureFixture
) -> None:
    logits = random_logits(3, 4096)
    states = [FixedUniform(sampling, 0.5) for _ in range(3)]
    expected = sample_ids(make_sampler(4096, forbidden=[0, 2]), logits.clone(), states)
    logits[1] = math.nan
    with caplog.at_level(logging.WARNING):
        token_ids = sample_ids(make_sampler(4096, forbidden=[0, 2]), logits, states)
    assert token_ids == [expected[0], 1, expected[2]]
    assert caplog.messages == ["1 of 3 sequences have no finite logit"]


def test_broken_row_whose_last_resort_is_banned_gets_it_all_the_same() -> None:
    logits = torch.full((1, 4096), math.nan)
    state = FixedUniform(SamplingParams(logit_bias=((0, -100.0),)), 0.5)
    assert sample_ids(make_sampler(4096), logits, [state]) == [0]


@pytest.mark.parametrize(("repetition_penalty", "expected"), [(1e-300, 0), (1e300, 3)])
def test_absurd_penalty_still_gives_a_token(repetition_penalty: float, expected: int) -> None:
    logits = torch.tensor([[1.0, -1.0, -math.inf, 0.0]])
    state = FixedUniform(
        SamplingParams(repetition_penalty=repetition_penalty), 0.5, prompt_token_ids=range(4)
    )
    assert sample_ids(make_sampler(4), logits, [state]) == [expected]


@pytest.mark.parametrize("sampling", EVERY_WAY)
def test_tokens_with_nan_count_as_never(sampling: SamplingParams) -> None:
    logits = torch.full((4096,), math.nan)
    logits[77] = -3.0
    assert sample_one(logits, sampling) == 77


def test_infinite_logit_is_certain() -> None:
    logits = random_logits(1, 4096)[0]
    logits[123] = math.inf
    for sampling in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5)):
        assert sample_one(logits, sampling, 0.999) == 123


def test_logits_made_in_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        logits = random_logits(1, 50)
    assert sample_ids(
        make_sampler(50, forbidden=[0]),
        logits,
        [FixedUniform(SamplingParams(temperature=0.0), 0.0)],
    ) == [int(logits.argmax())]


def slow_choice(logits: Sequence[float], sampling: SamplingParams, number: float) -> int:
    """The definition, one step after the other in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = {i: math.exp((logits[i] - logits[order[0]]) / sampling.temperature) for i in order}
    if sampling.top_k is not None:
        last = logits[order[min(sampling.top_k, len(order)) - 1]]
        order = [i for i in order if logits[i] >= last]
    total, above, kept = math.fsum(weights[i] for i in order), 0.0, []
    for i in order:
        if above >= sampling.top_p * total and sampling.top_p < 1:
            break
        kept.append(i)
        above += weights[i]
    kept = [i for i in kept if weights[i] >= sampling.min_p and weights[i] > 0]
    target, mass = number * sum(weights[i] for i in kept), 0.0
    for i in kept:
        mass += weights[i]
        if mass > target:
            return i
    return kept[-1]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=2, max_size=30),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0]),
    top_k=st.integers(2, 40),
    top_p=st.sampled_from([0.1, 0.37, 0.61, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.4]),
    number=st.floats(0, LARGEST_UNIFORM),
)
def test_choice_is_the_one_that_the_definition_gives(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    sampling = SamplingParams(
        temperature=temperature,
        top_k=min(top_k, len(logits) - 1) if len(logits) > 2 else None,
        top_p=top_p,
        min_p=min_p,
    )
    if sampling.top_k is None and top_p == 1 and min_p == 0:
        return  # chosen in the order of ids
    assert sample_one(torch.tensor(logits), sampling, number) == slow_choice(
        logits, sampling, number
    )
