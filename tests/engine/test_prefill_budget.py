"""Prompts ride along with answers, and do not make them stutter."""

from statistics import median, quantiles

import pytest

from gemma_serve.engine.prefill_budget import PrefillBudget
from gemma_serve.engine.scheduler import Scheduler
from gemma_serve.engine.sequence import Sequence
from tests.engine.builders import make_block_manager, make_sequence

WEIGHTS_S = 0.0183
TOKEN_S = 0.00009
"""What 27B takes on an H100: reading its weights at 3 TB/s, or computing at 600 TFLOP/s."""


def learnt(*steps: tuple[int, int, float], max_slowdown: float = 2.0) -> PrefillBudget:
    """From ``(num_decoding, num_prompt_tokens, duration_s)``."""
    budget = PrefillBudget(chunk_size=512, max_slowdown=max_slowdown)
    for num_decoding, num_prompt_tokens, duration_s in steps:
        budget.observe(
            num_decoding=num_decoding, num_prompt_tokens=num_prompt_tokens, duration_s=duration_s
        )
    return budget


PLAIN = ((8, 0, 0.01),) * 4


def test_prompts_are_not_limited_before_steps_are_known_or_while_nobody_decodes() -> None:
    mixed = (8, 512, 0.06)
    assert learnt(*PLAIN[:3], mixed).tokens(num_decoding=8, num_waiting=1) == 512
    assert learnt(*PLAIN).tokens(num_decoding=8, num_waiting=1) == 512
    assert learnt(*PLAIN, mixed).tokens(num_decoding=8, num_waiting=1) < 512
    assert learnt(*PLAIN, mixed).tokens(num_decoding=0, num_waiting=1) == 512


@pytest.mark.parametrize(
    ("max_slowdown", "num_waiting", "expected"),
    [(2.0, 1, 102), (3.0, 1, 204), (2.0, 16, 204), (1.01, 1, 32), (9.0, 1, 512)],
)
def test_a_step_gets_as_many_tokens_as_its_duration_allows(
    max_slowdown: float, num_waiting: int, expected: int
) -> None:
    """A prompt token takes 0.0977 ms beside 10 ms."""
    budget = learnt(*PLAIN, (8, 512, 0.06), max_slowdown=max_slowdown)
    assert budget.tokens(num_decoding=8, num_waiting=num_waiting) == expected


def test_the_nearest_known_number_of_sequences_tells() -> None:
    budget = learnt(*PLAIN, *((60, 0, 0.03),) * 4, (8, 500, 0.06))
    assert budget.tokens(num_decoding=12, num_waiting=1) == 100
    assert budget.tokens(num_decoding=100, num_waiting=1) == 300


def test_prompts_that_cost_nothing_are_not_limited() -> None:
    assert learnt(*PLAIN, (8, 512, 0.009)).tokens(num_decoding=8, num_waiting=1) == 512


def test_there_is_always_room_for_an_image() -> None:
    budget = PrefillBudget(chunk_size=512, max_slowdown=1.1, min_tokens=256)
    for _ in range(4):
        budget.observe(num_decoding=1, num_prompt_tokens=0, duration_s=0.01)
    budget.observe(num_decoding=1, num_prompt_tokens=512, duration_s=1.0)
    assert budget.tokens(num_decoding=1, num_waiting=1) == 256


def gaps_s(prefill_budget: PrefillBudget | None) -> list[float]:
    """Durations of the steps of 32 answers, by a simple model of a GPU, while a prompt of 4,096
    tokens comes every 64 steps."""
    blocks = make_block_manager(num_blocks=30_000)
    scheduler = Scheduler(
        block_manager=blocks,
        max_num_seqs=64,
        prefill_chunk_size=2048,
        prefill_budget=prefill_budget,
    )
    answers = [make_sequence(blocks, num_prompt_tokens=10, arrival=i) for i in range(32)]
    for sequence in answers:
        scheduler.add(sequence)
    durations_s = []
    prompts: list[Sequence] = []
    for index in range(700):
        if index % 64 == 32:
            prompts.append(make_sequence(blocks, num_prompt_tokens=4096, arrival=100 + index))
            scheduler.add(prompts[-1])
        batch = scheduler.schedule()
        assert batch is not None
        num_tokens = sum(s.end - s.start for s in batch.scheduled)
        duration_s = max(WEIGHTS_S, num_tokens * TOKEN_S)
        for scheduled in batch.sampling:
            scheduled.sequence.token_ids.append(7)
        scheduler.mark_computed(batch)
        scheduler.remove([s.sequence for s in batch.sampling if s.sequence in prompts])
        scheduler.observe(batch, duration_s)
        durations_s.append(duration_s)
    assert scheduler.num_running + scheduler.num_waiting - len(answers) <= 1  # none piles up
    return durations_s[128:]  # it has learnt by then


def test_answers_go_on_smoothly_while_long_prompts_come() -> None:
    """The goal on a GPU: the 99th percentile between tokens is at most twice the median."""
    unlimited = gaps_s(None)
    limited = gaps_s(PrefillBudget(chunk_size=2048, max_slowdown=1.75))
    assert quantiles(unlimited, n=100)[98] > 9 * median(unlimited)
    assert quantiles(limited, n=100)[98] <= 2 * median(limited)
    assert sum(limited) < 1.1 * sum(unlimited)
