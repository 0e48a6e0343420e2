"""A smaller model guesses whatever happens to the sequences, and holds blocks for none too long."""

import logging
from dataclasses import replace

import pytest

from gemma_serve.engine.draft_costs import DraftCosts
from gemma_serve.engine.drafter import Drafter
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.prompt_lookup import LookupDrafter
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.sequence import ImageSpan, PromptInputs
from gemma_serve.generation import FinishReason, SamplingParams
from tests.engine.builders import (
    FreeDrafts,
    ScriptedRunner,
    make_block_manager,
    make_engine,
    make_request,
    make_speculation,
    spell,
)
from tests.engine.hash_model import HashModel, make_drafter
from tests.engine.test_engine import run

SAID = "pack my box with five dozen jugs"


class CostlyDrafts(DraftCosts):
    """A device on which a guess must be right about three times in ten."""

    def of(self, num_decoding: int) -> float:  # noqa: ARG002  # the same for any number
        return 0.3


def drafted_engine(
    runner: ScriptedRunner, *drafters: Drafter, make_costs: type[DraftCosts] = FreeDrafts
) -> Engine:
    speculation = make_speculation(*drafters, make_costs=make_costs)
    return make_engine(runner, speculation=speculation, max_model_len=200)


def computed(runner: ScriptedRunner) -> list[list[tuple[int, int]]]:
    """What each step computed, as ``(start, end)`` of each sequence."""
    return [[(s.start, s.end) for s in batch.scheduled] for batch in runner.batches]


def begun(runner: ScriptedRunner) -> list[int]:
    """Where the computing of each sequence began, behind what was cached of it."""
    starts: dict[int, int] = {}
    for batch in runner.batches:
        for scheduled in batch.scheduled:
            starts.setdefault(scheduled.sequence.arrival, scheduled.start)
    return list(starts.values())


def test_right_guesses_save_steps() -> None:
    runner, blocks = ScriptedRunner(SAID), make_block_manager()
    engine = drafted_engine(runner, make_drafter(ScriptedRunner(SAID), blocks))
    engine.add(make_request(prompt="say: "))
    result = run(engine)[0, 0]
    assert (result.text, result.finish_reason) == (SAID, FinishReason.STOP)
    # The first letter comes with the prompt, the others by fives.
    assert len(runner.batches) == 1 + 7
    assert engine.stats.num_accepted_tokens == engine.stats.num_drafted_tokens
    assert blocks.num_free_blocks == blocks.num_blocks


def test_known_tokens_are_computed_once_and_right_guesses_with_them() -> None:
    guessing = ScriptedRunner(SAID)
    engine = drafted_engine(ScriptedRunner(SAID), make_drafter(guessing, make_block_manager()))
    engine.add(make_request(prompt="say: ", max_tokens=11))
    run(engine)
    # Six tokens are known, four are guessed; then the last guess and what came after it.
    assert computed(guessing) == [
        [(0, 6)],
        [(6, 7)],
        [(7, 8)],
        [(8, 9)],
        [(9, 11)],
        [(11, 12)],
        [(12, 13)],
        [(13, 14)],
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_model_as_its_own_draft_is_always_right(temperature: float) -> None:
    blocks, drafter_blocks = make_block_manager(), make_block_manager()
    speculation = make_speculation(make_drafter(HashModel(drafter_blocks), drafter_blocks))
    engine = make_engine(HashModel(blocks), block_manager=blocks, speculation=speculation)
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=40, ignore_eos=True)
    engine.add(EngineRequest(key=0, prompt=PromptInputs(spell("abc ")), sampling=sampling))
    run(engine)
    assert engine.stats.num_accepted_tokens == engine.stats.num_drafted_tokens > 25


def test_guesses_that_never_come_true_are_soon_given_up() -> None:
    said = "x" * 150
    engine = drafted_engine(
        ScriptedRunner(said),
        make_drafter(ScriptedRunner("y" * 200), make_block_manager()),
        make_costs=CostlyDrafts,
    )
    engine.add(make_request(0, prompt="say: "))
    assert run(engine, max_steps=200)[0, 0].text == said
    assert 5 < (num_drafted := engine.stats.num_drafted_tokens) < 30
    engine.add(make_request(1, prompt="once more: "))  # the next one does not begin afresh
    run(engine, max_steps=200)
    assert engine.stats.num_drafted_tokens - num_drafted < 15


def test_what_stood_in_the_text_before_is_looked_up_and_the_rest_asked_of_the_model() -> None:
    said = "one two three, one two three"
    guessing = ScriptedRunner(said)
    engine = drafted_engine(
        ScriptedRunner(said), LookupDrafter(), make_drafter(guessing, make_block_manager())
    )
    engine.add(make_request(prompt="say: ", max_tokens=len(said)))
    assert run(engine)[0, 0].text == said
    assert engine.stats.num_accepted_tokens == engine.stats.num_drafted_tokens
    last_guessed = max(end for step in computed(guessing) for _, end in step)
    assert last_guessed < len("say: one two three, one two ")


def test_siblings_compute_their_prompt_once() -> None:
    guessing = ScriptedRunner(SAID)
    engine = drafted_engine(ScriptedRunner(SAID), make_drafter(guessing, make_block_manager()))
    engine.add(make_request(prompt="a prompt", n=2))
    assert {result.text for result in run(engine).values()} == {SAID}
    assert begun(guessing) == [0, 8]


def test_wrong_guess_leaves_nothing_in_the_prefix_cache() -> None:
    guessing = ScriptedRunner("?yyyyyyyy")
    engine = drafted_engine(ScriptedRunner("xzzzz"), make_drafter(guessing, make_block_manager()))
    engine.add(make_request(0, prompt="abcdef"))
    run(engine)
    engine.add(make_request(1, prompt="abcdefxyyyyyy"))  # what was guessed and computed
    run(engine)
    assert begun(guessing) == [0, 4]


def test_guesses_wait_for_the_step_after_that_of_a_prompt() -> None:
    guessing = ScriptedRunner(SAID)
    drafter = make_drafter(guessing, make_block_manager(), prefill_chunk_size=32)
    engine = drafted_engine(ScriptedRunner(SAID), drafter)
    engine.add(make_request(prompt="a prompt of 20 bytes"))
    assert run(engine)[0, 0].text == SAID
    assert computed(guessing)[:3] == [[(0, 20)], [(20, 22)], [(22, 23)]]


def test_long_prompt_does_not_keep_others_from_being_guessed() -> None:
    guessing = ScriptedRunner(SAID)
    engine = drafted_engine(
        ScriptedRunner(SAID), make_drafter(guessing, make_block_manager(), prefill_chunk_size=8)
    )
    engine.add(make_request(0, prompt="say: "))
    engine.add(make_request(1, prompt="a prompt of three chunks"))
    assert {result.text for result in run(engine).values()} == {SAID}
    with_part_of_it = [b for b in guessing.batches if not all(s.samples for s in b.scheduled)]
    assert len(with_part_of_it) > 2
    assert all(batch.sampling for batch in with_part_of_it)


def test_chat_with_an_image_is_not_guessed() -> None:
    guessing = ScriptedRunner(SAID)
    engine = drafted_engine(ScriptedRunner(SAID), make_drafter(guessing, make_block_manager()))
    prompt = PromptInputs((7, 999, 999, 8), (ImageSpan(1, 2, b"view"),))
    engine.add(EngineRequest(key=0, prompt=prompt, sampling=SamplingParams()))
    assert run(engine)[0, 0].text == SAID
    assert guessing.batches == []


def test_request_may_go_without() -> None:
    guessing = ScriptedRunner(SAID)
    engine = drafted_engine(ScriptedRunner(SAID), make_drafter(guessing, make_block_manager()))
    request = make_request(prompt="say: ")
    engine.add(replace(request, sampling=replace(request.sampling, speculation=False)))
    assert run(engine)[0, 0].text == SAID
    assert guessing.batches == []


def test_text_beyond_what_the_smaller_model_reads_is_not_guessed() -> None:
    guessing = ScriptedRunner(SAID)
    drafter = make_drafter(guessing, make_block_manager(), max_model_len=14)
    engine = drafted_engine(ScriptedRunner(SAID), drafter)
    engine.add(make_request(prompt="say: "))
    assert run(engine)[0, 0].text == SAID
    assert max(end for step in computed(guessing) for _, end in step) == 13
    assert engine.stats.num_accepted_tokens == 4 + 3


def test_tokens_of_a_larger_vocabulary_are_read_as_others() -> None:
    read: set[int] = set()
    guessing = ScriptedRunner(
        SAID, lambda batch: read.update(i for s in batch.scheduled for i in s.token_ids)
    )
    drafter = make_drafter(guessing, make_block_manager(), vocab_size=128)
    engine = drafted_engine(ScriptedRunner(SAID), drafter)
    prompt = PromptInputs((*spell("say "), 200, 201))
    engine.add(EngineRequest(key=0, prompt=prompt, sampling=SamplingParams()))
    assert run(engine)[0, 0].text == SAID
    assert max(read) < 128
    assert engine.stats.num_accepted_tokens == engine.stats.num_drafted_tokens > 0


@pytest.mark.parametrize("num_blocks", range(12))
def test_without_room_there_are_fewer_guesses_and_the_same_text(num_blocks: int) -> None:
    blocks = make_block_manager(num_blocks=num_blocks)
    engine = drafted_engine(ScriptedRunner(SAID), make_drafter(ScriptedRunner(SAID), blocks))
    for key in range(3):
        engine.add(make_request(key, prompt=f"{key}, say: "))
    assert {result.text for result in run(engine).values()} == {SAID}
    assert blocks.num_free_blocks == num_blocks


def test_sequence_that_lost_its_place_comes_back_by_another_name() -> None:
    """Runners know tables of blocks by their sequence's arrival, and this is another table."""
    guessing = ScriptedRunner(SAID)
    engine = make_engine(
        ScriptedRunner(SAID),
        block_manager=make_block_manager(num_blocks=14),
        max_model_len=56,
        speculation=make_speculation(make_drafter(guessing, make_block_manager())),
    )
    for key in range(2):
        engine.add(make_request(key, prompt="say: "))
    assert {result.text for result in run(engine).values()} == {SAID}
    assert len(begun(guessing)) == 3


def test_failure_ends_the_guessing_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: ScheduledBatch) -> None:
        raise MemoryError("Tried to allocate 2.00 GiB.")

    guessing = ScriptedRunner(SAID, fail)
    engine = drafted_engine(ScriptedRunner(SAID), make_drafter(guessing, make_block_manager()))
    for key in range(2):
        engine.add(make_request(key, prompt="say: "))
    with caplog.at_level(logging.ERROR, logger="gemma_serve"):
        assert {result.text for result in run(engine).values()} == {SAID}
    assert len(guessing.batches) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "guessing failed; there will be no more guesses of this kind"
    ]
