import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from gemma_serve.engine.engine import Engine, EngineRequest, StepOutput
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.sequence import PromptInputs, Sequence
from gemma_serve.generation import FinishReason, GenerationDelta, SamplingParams
from tests.engine.builders import ScriptedRunner, make_block_manager, make_engine, make_request


def run(engine: Engine, *, max_steps: int = 100) -> dict[tuple[int, int], GenerationDelta]:
    """Step until idle; the merged deltas by request and index."""
    merged: dict[tuple[int, int], GenerationDelta] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return merged
        for output in engine.step():
            for delta in output.deltas:
                key = (output.key, delta.index)
                merged[key] = merged[key] + delta if key in merged else delta
    raise AssertionError("the engine did not finish")


def test_text_ends_at_the_eos_token_which_counts_but_is_not_shown() -> None:
    engine = make_engine(ScriptedRunner("Paris"))
    engine.add(make_request())
    result = run(engine)[0, 0]
    assert (result.text, len(result.token_ids), result.finish_reason) == ("Paris", 6, "stop")


def test_max_tokens_ends_with_length() -> None:
    engine = make_engine(ScriptedRunner("Paris"))
    engine.add(make_request(max_tokens=3))
    result = run(engine)[0, 0]
    assert (result.text, result.finish_reason) == ("Par", FinishReason.LENGTH)


def test_the_end_of_the_context_ends_with_length() -> None:
    """llama.cpp#12357: shifting the context instead made gibberish."""
    engine = make_engine(ScriptedRunner("Paris"), max_model_len=7)
    engine.add(make_request(prompt="hello"))
    assert run(engine)[0, 0].text == "Pa"


def test_a_stop_string_and_what_follows_are_not_shown() -> None:
    engine = make_engine(ScriptedRunner("yes END no"))
    engine.add(make_request(stop=("END",)))
    result = run(engine)[0, 0]
    assert (result.text, result.finish_reason) == ("yes ", FinishReason.STOP)


def test_a_stop_token_ends_and_is_not_shown() -> None:
    engine = make_engine(ScriptedRunner("abc"))
    engine.add(make_request(stop_token_ids=(ord("b"),)))
    assert run(engine)[0, 0].text == "a"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"max_tokens": 3}, None),
        ({"stop": ("s", "ri")}, "ri"),
        ({"stop_token_ids": (ord("i"),)}, ord("i")),
        ({"stop": ("is",)}, None),
    ],
)
def test_only_a_stop_of_the_requests_own_is_told(
    fields: dict[str, Any], reason: str | int | None
) -> None:
    engine = make_engine(ScriptedRunner("Paris"), stop_strings=("is",))
    engine.add(make_request(**fields))
    assert run(engine)[0, 0].stop_reason == reason


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    engine = make_engine(ScriptedRunner("go EN"))
    engine.add(make_request(stop=("END",)))
    assert run(engine)[0, 0].text == "go EN"


def test_the_checkpoints_own_stops_end_unless_ignored() -> None:
    engine = make_engine(ScriptedRunner("a\n\nUser: b"), stop_strings=("\n\nUser:",))
    engine.add(make_request(0))
    engine.add(make_request(1, ignore_eos=True, max_tokens=12))
    results = run(engine)
    assert results[0, 0].text == "a"
    assert results[1, 0].text == "a\n\nUser: b\x01\x01"


def test_n_sequences_of_one_request_finish_each_by_itself() -> None:
    def script(sequence: Sequence) -> int:
        num_completed = len(sequence.token_ids) - 5
        return ord("x") if num_completed <= sequence.index else 1

    engine = make_engine(ScriptedRunner(script))
    engine.add(make_request(n=3))
    assert [run_result.text for _, run_result in sorted(run(engine).items())] == ["x", "xx", "xxx"]


def test_an_aborted_request_frees_its_blocks_at_once_and_yields_nothing_more() -> None:
    engine = make_engine(ScriptedRunner("a long answer"))
    engine.add(make_request(0, n=2))
    engine.add(make_request(1))
    engine.step()
    engine.abort(0)
    engine.abort(0)
    assert {key for key, _ in run(engine)} == {1}
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_a_preempted_sequence_says_the_same_as_an_undisturbed_one() -> None:
    blocks = make_block_manager(num_blocks=8, block_size=4)
    engine = make_engine(ScriptedRunner("abcdefghijklmnop"), block_manager=blocks, max_model_len=32)
    for key in range(3):
        engine.add(make_request(key, prompt="12345678"))
    assert {r.text for r in run(engine).values()} == {"abcdefghijklmnop"}
    assert blocks.num_free_blocks == 8


def test_a_failed_step_ends_its_own_requests_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def script(sequence: Sequence) -> int:
        if sequence.request_key == 0:
            raise RuntimeError("device-side assert")
        return 1

    engine = make_engine(ScriptedRunner(script), max_num_seqs=1)
    engine.add(make_request(0))
    engine.add(make_request(1))
    with caplog.at_level(logging.CRITICAL):
        (failure,) = engine.step()
    assert failure.key == 0
    assert "device-side" not in str(failure.error)
    assert engine.stats.num_failed_steps_in_a_row == 1
    assert run(engine)[1, 0].finish_reason is FinishReason.STOP
    assert engine.stats.num_failed_steps_in_a_row == 0
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def out_of_memory_above(num_tokens: int) -> Callable[[ScheduledBatch], None]:
    """A device that holds the activations of so many tokens."""

    def check(batch: ScheduledBatch) -> None:
        if sum(s.end - s.start for s in batch.scheduled) > num_tokens:
            raise MemoryError("Tried to allocate 2.00 GiB.")

    return check


def test_out_of_memory_ends_the_newest_requests_until_the_step_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = ScriptedRunner("Paris", before_step=out_of_memory_above(10))
    engine = make_engine(runner, max_num_seqs=4, prefill_chunk_size=20)
    for key, prompt in enumerate(("hello", "howdy", "salut", "guten")):  # twenty tokens
        engine.add(make_request(key, prompt=prompt))
    with caplog.at_level(logging.CRITICAL):
        failures = [*engine.step(), *engine.step()]
    assert [(f.key, str(f.error)[:28]) for f in failures] == [
        (3, "The server ran out of memory"),
        (2, "The server ran out of memory"),
    ]
    assert engine.stats.num_failed_steps_in_a_row == 0
    assert {key: r.text for key, r in run(engine).items()} == {(0, 0): "Paris", (1, 0): "Paris"}
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_a_request_too_large_for_memory_by_itself_ends_and_counts_as_a_failed_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(ScriptedRunner("Paris", before_step=out_of_memory_above(4)))
    engine.add(make_request(0))
    with caplog.at_level(logging.ERROR):
        (failure,) = engine.step()
    assert failure.error is not None
    assert engine.stats.num_failed_steps_in_a_row == 1
    assert "out of memory in a step of 1 requests" in caplog.text
    engine.add(make_request(1, prompt="hey"))
    assert run(engine)[1, 0].text == "Paris"
    assert engine.stats.num_failed_steps_in_a_row == 0


def test_out_of_memory_in_mid_decode_costs_the_others_no_token() -> None:
    num_steps = 0

    def fail_once(_: ScheduledBatch) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            raise MemoryError

    engine = make_engine(ScriptedRunner("Paris", before_step=fail_once))
    engine.add(make_request(0, prompt="hello"))
    engine.add(make_request(1, prompt="howdy"))
    assert {key: r.text for key, r in run(engine).items()} == {(0, 0): "Paris", (1, 0): "Pa"}


def test_the_first_delta_tells_how_much_of_the_prompt_was_cached() -> None:
    engine = make_engine(ScriptedRunner("Paris"))
    for key in range(2):
        engine.add(make_request(key, prompt="what is the capital"))
        first, *others = [d for o in steps(engine) for d in o.deltas]
        assert first.cached_tokens == [0, 16][key]
        assert {delta.cached_tokens for delta in others} == {0}


def test_a_prompt_without_an_answer_tells_how_much_of_it_was_cached() -> None:
    engine = make_engine(ScriptedRunner("Paris"))
    for key in range(2):
        engine.add(make_request(key, prompt="what is the capital", max_tokens=0))
        (result,) = run(engine).values()
        assert (result.text, result.finish_reason) == ("", FinishReason.LENGTH)
        assert result.cached_tokens == [0, 16][key]


def test_siblings_say_what_they_say_alone_and_share_the_prompt() -> None:
    runner = ScriptedRunner("Paris")
    engine = make_engine(runner)
    engine.add(make_request(prompt="what is the capital", n=4))
    results = run(engine)
    assert {result.text for result in results.values()} == {"Paris"}
    assert [results[0, index].cached_tokens for index in range(4)] == [0, 16, 16, 16]
    assert runner.batches[0].scheduled[0].end == 16


def test_a_request_with_another_salt_shares_nothing() -> None:
    engine = make_engine(ScriptedRunner("Paris"))
    for key, salt in enumerate(("ann", "bob", None)):
        request = replace(make_request(key, prompt="what is the capital"), cache_salt=salt)
        engine.add(request)
        assert run(engine)[key, 0].cached_tokens == 0


def test_nothing_is_shared_when_the_prefix_cache_is_off() -> None:
    engine = make_engine(ScriptedRunner("Paris"), enable_prefix_cache=False)
    for key in range(2):
        engine.add(make_request(key, prompt="what is the capital", n=2))
        assert {result.cached_tokens for result in run(engine).values()} == {0}
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def steps(engine: Engine) -> Iterator[StepOutput]:
    while engine.has_work:
        yield from engine.step()


def test_nothing_ends_before_min_tokens_but_max_tokens() -> None:
    engine = make_engine(ScriptedRunner("a!b!c"))
    sampling = SamplingParams(min_tokens=3, stop=("!",))
    engine.add(EngineRequest(key=0, prompt=PromptInputs((5,)), sampling=sampling))
    engine.add(EngineRequest(key=1, prompt=PromptInputs((5,)), sampling=SamplingParams()))
    assert {key: result.text for key, result in run(engine).items()} == {
        (0, 0): "a!b",
        (1, 0): "a!b!c",
    }


def test_stop_string_is_shown_if_asked_for() -> None:
    engine = make_engine(ScriptedRunner("Paris.\nUser"))
    sampling = SamplingParams(stop=("\n",), include_stop_str_in_output=True)
    engine.add(EngineRequest(key=0, prompt=PromptInputs((5,)), sampling=sampling))
    assert run(engine)[0, 0].text == "Paris.\n"
