import math
from collections.abc import Sequence

import pytest

from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.generation import SamplingParams


def make_state(
    sampling: SamplingParams | None = None, *, seed: int = 7, prompt: Sequence[int] = ()
) -> SamplingState:
    return SamplingState(sampling or SamplingParams(), seed=seed, prompt_token_ids=prompt)


def draw(state: SamplingState, count: int) -> list[float]:
    numbers = []
    for _ in range(count):
        numbers.append(state.uniform())
        state.append(0)
    return numbers


def entries(state: SamplingState) -> dict[int, tuple[int, int, float]]:
    assert state.adjustments is not None
    columns = state.adjustments
    return {
        token_id: (is_in_text, count, bias)
        for token_id, is_in_text, count, bias in zip(
            columns.token_ids, columns.is_in_text, columns.counts, columns.biases, strict=True
        )
    }


def test_uniform_numbers_are_the_same_on_every_platform() -> None:
    assert draw(make_state(seed=42), 3) == [
        0.8257553219088898,
        0.21521194530070598,
        0.12796576458860487,
    ]


def test_uniform_number_is_stable_until_a_token_is_appended() -> None:
    state = make_state()
    first = state.uniform()
    assert state.uniform() == first
    state.append(5)
    assert state.uniform() != first


def test_state_that_is_replayed_after_preemption_goes_on_with_the_same_numbers() -> None:
    numbers = draw(make_state(seed=3), 5)
    replayed = make_state(seed=3)
    for token_id in (9, 9, 9):
        replayed.append(token_id)
    assert draw(replayed, 2) == numbers[3:]


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = draw(make_state(seed=1), 20_000)
    assert 0 <= min(numbers) < 0.001
    assert 0.999 < max(numbers) < 1
    per_tenth = [sum(int(number * 10) == tenth for number in numbers) for tenth in range(10)]
    chi_square = sum((count - 2000) ** 2 / 2000 for count in per_tenth)
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_neighbouring_seeds_give_unrelated_numbers() -> None:
    first, second = draw(make_state(seed=1), 1000), draw(make_state(seed=2), 1000)
    mean_product = sum((a - 0.5) * (b - 0.5) for a, b in zip(first, second, strict=True)) / 1000
    assert abs(mean_product) < 0.01


def test_derived_seed_depends_on_the_index_and_only_on_its_arguments() -> None:
    seeds = [SamplingState.derive_seed(11, index) for index in range(4)]
    assert len(set(seeds)) == 4
    assert seeds == [SamplingState.derive_seed(11, index) for index in range(4)]


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, -(2**63), 2**80])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= SamplingState.derive_seed(seed, 0) < 2**64


def test_requests_without_a_seed_get_different_ones() -> None:
    assert SamplingState.derive_seed(None, 0) != SamplingState.derive_seed(None, 0)


def test_completion_tokens_are_counted_without_any_penalty() -> None:
    state = make_state(prompt=[1, 2, 3])
    state.append(8)
    state.append(8)
    assert state.num_completion_tokens == 2
    assert state.adjustments is None


def test_repetition_penalty_covers_prompt_and_completion() -> None:
    state = make_state(SamplingParams(repetition_penalty=1.2), prompt=[4, 5, 4])
    state.append(5)
    state.append(6)
    assert entries(state) == {4: (1, 0, 0.0), 5: (1, 1, 0.0), 6: (1, 1, 0.0)}


@pytest.mark.parametrize(
    "sampling", [SamplingParams(presence_penalty=0.5), SamplingParams(frequency_penalty=-0.5)]
)
def test_presence_and_frequency_penalties_leave_the_prompt_out(sampling: SamplingParams) -> None:
    state = make_state(sampling, prompt=[4, 5])
    state.append(6)
    state.append(6)
    assert entries(state) == {6: (1, 2, 0.0)}


def test_logit_bias_alone_keeps_neither_prompt_nor_completion() -> None:
    state = make_state(SamplingParams(logit_bias=((3, 2.5), (4, -99.5))), prompt=[4])
    state.append(9)
    assert entries(state) == {3: (0, 0, 2.5), 4: (0, 0, -99.5)}


def test_bias_of_minus_one_hundred_bans_the_token() -> None:
    state = make_state(SamplingParams(logit_bias=((3, -100.0),)))
    assert entries(state) == {3: (0, 0, -math.inf)}


def test_bias_of_a_token_survives_its_appearance() -> None:
    state = make_state(SamplingParams(logit_bias=((3, 1.0),), presence_penalty=1.0))
    state.append(3)
    assert entries(state) == {3: (1, 1, 1.0)}
