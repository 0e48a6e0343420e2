import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.engine.prompt_scores import PromptScores
from gemma_serve.engine.scheduler import ScheduledBatch, Scheduler
from gemma_serve.engine.sequence import ImageSpan, PromptInputs, Sequence
from tests.engine.builders import (
    make_block_manager,
    make_scheduler,
    make_sequence,
    make_sharing_sequence,
)


def chunks(batch: ScheduledBatch | None) -> list[tuple[int, int, int]]:
    """``(arrival, start, end)`` of each scheduled sequence."""
    assert batch is not None
    return [(s.sequence.arrival, s.start, s.end) for s in batch.scheduled]


def run_step(scheduler: Scheduler) -> ScheduledBatch | None:
    """Schedule, and give token 7 to each sequence that samples."""
    batch = scheduler.schedule()
    if batch is not None:
        scheduler.mark_computed(batch)
        for scheduled in batch.sampling:
            scheduled.sequence.token_ids.append(7)
    return batch


def test_an_idle_scheduler_has_no_batch() -> None:
    assert make_scheduler(make_block_manager()).schedule() is None


def test_prompts_share_one_chunk_budget_in_order() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=8)
    for arrival in range(3):
        scheduler.add(make_sequence(blocks, num_prompt_tokens=5, arrival=arrival))
    assert chunks(run_step(scheduler)) == [(0, 0, 5), (1, 0, 3)]
    assert chunks(run_step(scheduler)) == [(0, 5, 6), (1, 3, 5), (2, 0, 5)]


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=8)
    scheduler.add(make_sequence(blocks, num_prompt_tokens=2, arrival=0))
    run_step(scheduler)
    scheduler.add(make_sequence(blocks, num_prompt_tokens=20, arrival=1))
    assert chunks(run_step(scheduler)) == [(0, 2, 3), (1, 0, 8)]
    assert chunks(run_step(scheduler)) == [(0, 3, 4), (1, 8, 16)]


def test_only_the_chunk_that_reaches_the_end_samples() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=8)
    scheduler.add(make_sequence(blocks, num_prompt_tokens=9))
    first, second = run_step(scheduler), run_step(scheduler)
    assert first is not None
    assert second is not None
    assert (first.sampling, len(second.sampling)) == ([], 1)


def test_a_chunk_ends_before_an_image_that_it_would_cut() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=8)
    scheduler.add(make_sequence(blocks, num_prompt_tokens=14, images=[(5, 11)]))
    assert chunks(run_step(scheduler)) == [(0, 0, 5)]
    assert chunks(run_step(scheduler)) == [(0, 5, 13)]


def test_an_image_waits_for_a_step_with_enough_budget_left() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=8)
    scheduler.add(make_sequence(blocks, num_prompt_tokens=6, arrival=0))
    scheduler.add(make_sequence(blocks, num_prompt_tokens=8, arrival=1, images=[(0, 6)]))
    assert chunks(run_step(scheduler)) == [(0, 0, 6)]
    assert chunks(run_step(scheduler)) == [(0, 6, 7), (1, 0, 8)]


def test_no_more_sequences_run_than_allowed() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, max_num_seqs=2)
    for arrival in range(3):
        scheduler.add(make_sequence(blocks, arrival=arrival))
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_a_prompt_waits_until_all_of_it_fits_beside_the_running_ones() -> None:
    blocks = make_block_manager(num_blocks=6, block_size=4)
    scheduler = make_scheduler(blocks, prefill_chunk_size=4)
    scheduler.add(make_sequence(blocks, num_prompt_tokens=16, arrival=0))
    scheduler.add(make_sequence(blocks, num_prompt_tokens=12, arrival=1))
    for _ in range(4):
        run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_the_newest_yields_when_the_oldest_needs_a_block() -> None:
    blocks = make_block_manager(num_blocks=4, block_size=4)
    scheduler = make_scheduler(blocks)
    old = make_sequence(blocks, num_prompt_tokens=8, arrival=0)
    new = make_sequence(blocks, num_prompt_tokens=7, arrival=1)
    scheduler.add(old)
    scheduler.add(new)
    run_step(scheduler)
    assert chunks(run_step(scheduler)) == [(0, 8, 9)]
    assert new.num_computed_tokens == 0
    assert new.token_ids[-1] == 7  # what was generated is kept, and computed again
    assert scheduler.num_waiting == 1


def test_removed_sequences_give_all_blocks_back() -> None:
    blocks = make_block_manager(num_blocks=10)
    scheduler = make_scheduler(blocks, max_num_seqs=1)
    running, waiting = make_sequence(blocks, arrival=0), make_sequence(blocks, arrival=1)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.remove([running, waiting])
    assert blocks.num_free_blocks == 10
    assert scheduler.schedule() is None


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8),
    windows=st.sampled_from([(None,), (None, 8), (6,), (None, 5, 5)]),
    num_spare_blocks=st.integers(0, 30),
    max_num_seqs=st.integers(1, 5),
    chunk_size=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_everything_finishes_and_no_block_is_lost_or_shared(
    lengths: list[tuple[int, int]],
    windows: tuple[int | None, ...],
    num_spare_blocks: int,
    max_num_seqs: int,
    chunk_size: int,
    seed: int,
) -> None:
    """Any load, on the smallest pool that the start-up check lets pass and on larger ones."""
    sizing = make_block_manager(num_blocks=0, windows=windows)
    num_blocks = sizing.blocks_for(52, chunk_size=chunk_size) + num_spare_blocks
    blocks = make_block_manager(num_blocks=num_blocks, windows=windows)
    scheduler = make_scheduler(blocks, max_num_seqs=max_num_seqs, prefill_chunk_size=chunk_size)
    rng = random.Random(seed)
    todo: dict[int, tuple[Sequence, int]] = {}
    for arrival, (num_prompt, num_completion) in enumerate(lengths):
        sequence = make_sequence(blocks, num_prompt_tokens=num_prompt, arrival=arrival)
        todo[arrival] = (sequence, num_prompt + num_completion)
        scheduler.add(sequence)
    for _ in range(3000):
        batch = run_step(scheduler)
        if batch is None:
            break
        num_prefill = sum(s.end - s.start for s in batch.scheduled if s.end - s.start > 1)
        assert num_prefill <= chunk_size
        assert scheduler.num_running <= max_num_seqs
        held = [
            block
            for sequence, _ in todo.values()
            for group, dead in zip(
                sequence.block_table.groups, sequence.block_table.num_released, strict=True
            )
            for block in group[dead:]
        ]
        assert len(held) == len(set(held)) == num_blocks - blocks.num_free_blocks
        for scheduled in batch.sampling:
            sequence = scheduled.sequence
            aborted = rng.random() < 0.02
            if aborted or len(sequence.token_ids) >= todo[sequence.arrival][1]:
                scheduler.remove([sequence])
                del todo[sequence.arrival]
    assert todo == {}
    assert blocks.num_free_blocks == num_blocks


def run_until_idle(scheduler: Scheduler, *, max_completion: int = 1) -> list[ScheduledBatch]:
    """Each sequence ends after ``max_completion`` tokens."""
    batches = []
    while (batch := run_step(scheduler)) is not None:
        batches.append(batch)
        scheduler.remove(
            [
                s.sequence
                for s in batch.sampling
                if len(s.sequence.token_ids) - len(s.sequence.prompt.token_ids) >= max_completion
            ]
        )
    return batches


def num_computed(batches: list[ScheduledBatch]) -> int:
    return sum(s.end - s.start for batch in batches for s in batch.scheduled)


def test_eight_answers_to_one_prompt_compute_it_once() -> None:
    """Each sibling computes what follows the last full block: at least one token for its logits."""
    blocks = make_block_manager(num_blocks=2000, block_size=16, windows=(None, 512))
    scheduler = make_scheduler(blocks, prefill_chunk_size=512)
    prompt = PromptInputs(tuple(range(1000)))
    for arrival in range(8):
        scheduler.add(make_sharing_sequence(blocks, prompt, arrival=arrival))
    batches = run_until_idle(scheduler)
    assert num_computed(batches) == 1000 + 7 * 8  # 1.06 times the work for one
    assert len(batches) == 3


def test_a_stranger_waits_only_until_the_shared_part_is_computed() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=16)
    shared = tuple(range(12))
    for arrival in range(2):
        prompt = PromptInputs((*shared, *(100 * (arrival + 1),) * 12))
        scheduler.add(make_sharing_sequence(blocks, prompt, arrival=arrival))
    assert chunks(run_step(scheduler)) == [(0, 0, 16)]
    assert chunks(run_step(scheduler)) == [(0, 16, 24), (1, 12, 20)]


def test_a_prompt_to_be_scored_takes_nothing_up_and_waits_for_nobody() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=32)
    prompt = PromptInputs(tuple(range(10)))
    for arrival in range(2):
        sequence = make_sharing_sequence(blocks, prompt, arrival=arrival)
        sequence.prompt_scores = PromptScores(num_prompt_tokens=10, num_top=0)
        scheduler.add(sequence)
    scheduler.add(make_sharing_sequence(blocks, prompt, arrival=2))
    assert chunks(run_step(scheduler)) == [(0, 0, 10), (1, 0, 10)]
    assert (2, 8, 10) in chunks(run_step(scheduler))


def test_others_are_started_while_somebody_waits_for_a_shared_part() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=16)
    prompt = PromptInputs(tuple(range(8)))
    for arrival, user in enumerate(("ann", "bob")):
        scheduler.add(make_sharing_sequence(blocks, prompt, arrival=arrival, user=user))
    scheduler.add(make_sequence(blocks, num_prompt_tokens=5, arrival=2, user="cid"))
    assert chunks(run_step(scheduler)) == [(0, 0, 8), (2, 0, 5)]
    assert chunks(run_step(scheduler)) == [(0, 8, 9), (2, 5, 6), (1, 4, 8)]


def test_who_waits_for_a_prompt_that_is_aborted_computes_it() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, prefill_chunk_size=4)
    prompt = PromptInputs(tuple(range(12)))
    first, second = (make_sharing_sequence(blocks, prompt, arrival=i) for i in range(2))
    scheduler.add(first)
    scheduler.add(second)
    assert chunks(run_step(scheduler)) == [(0, 0, 4)]
    scheduler.remove([first])
    assert chunks(run_step(scheduler)) == [(1, 4, 8)]


def test_a_preempted_sequence_takes_up_what_is_left_of_its_blocks() -> None:
    blocks = make_block_manager(num_blocks=6, block_size=4)
    scheduler = make_scheduler(blocks, prefill_chunk_size=32)
    old = make_sharing_sequence(blocks, PromptInputs(tuple(range(8))), arrival=0)
    new = make_sharing_sequence(blocks, PromptInputs(tuple(range(50, 63))), arrival=1)
    scheduler.add(old)
    scheduler.add(new)
    run_step(scheduler)
    assert chunks(run_step(scheduler)) == [(0, 8, 9)]  # takes one of the four
    scheduler.remove([old])
    assert chunks(run_step(scheduler)) == [(1, 12, 14)]
    assert new.num_cached_tokens == 0  # as it was when the sequence was started


def test_an_image_that_others_share_is_taken_up_whole_or_not_at_all() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks)
    image = ImageSpan(5, 6, b"picture")
    for arrival, end in enumerate((11, 12, 14)):
        prompt = PromptInputs((*range(5), *(99,) * 6, *range(end - 11)), (image,))
        scheduler.add(make_sharing_sequence(blocks, prompt, arrival=arrival))
        assert chunks(run_step(scheduler))[-1] == [(0, 0, 11), (1, 4, 12), (2, 12, 14)][arrival]


def test_users_take_turns_to_be_started() -> None:
    blocks = make_block_manager()
    scheduler = make_scheduler(blocks, max_num_seqs=3)
    for arrival, user in enumerate(("ann", "ann", "ann", "bob")):
        scheduler.add(make_sequence(blocks, arrival=arrival, user=user))
    assert chunks(run_step(scheduler)) == [(0, 0, 5), (3, 0, 5), (1, 0, 5)]


def test_who_was_started_last_is_preempted_though_it_came_first() -> None:
    """Otherwise a user who comes late would pay for another's many requests."""
    blocks = make_block_manager(num_blocks=4, block_size=4)
    scheduler = make_scheduler(blocks, max_num_seqs=2)
    for arrival, user in enumerate(("ann", "ann", "bob")):
        scheduler.add(make_sequence(blocks, num_prompt_tokens=7, arrival=arrival, user=user))
    assert chunks(run_step(scheduler)) == [(0, 0, 7), (2, 0, 7)]
    run_step(scheduler)
    assert chunks(run_step(scheduler)) == [(0, 8, 9)]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
