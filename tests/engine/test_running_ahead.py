"""Steps that begin before the tokens of the last one are known change no text and lose nothing."""

import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.engine.engine import Engine, EngineRequest, StepOutput
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.generation import GenerationDelta, SamplingParams
from tests.engine.builders import ScriptedRunner, make_block_manager, make_engine, make_request
from tests.engine.hash_model import HashModel, HashStep
from tests.engine.test_constraint import OneOf
from tests.engine.test_engine import run
from tests.engine.test_speculation import REQUESTS, WORDS, run_and_abort


class Watched:
    """Keeps what each step computed, and fails where a test says so."""

    def __init__(self, model: HashModel) -> None:
        self.batches: list[ScheduledBatch] = []
        self.failures: dict[tuple[str, int], Exception] = {}
        """By ``begin``, ``sample`` or ``tokens``, and the number of the step."""
        self._model = model

    def begin(self, batch: ScheduledBatch) -> "WatchedStep":
        self.batches.append(batch)
        number = len(self.batches)
        self.fail_if_told("begin", number)
        return WatchedStep(self, self._model.begin(batch), number)

    def fail_if_told(self, phase: str, number: int) -> None:
        if (error := self.failures.get((phase, number))) is not None:
            raise error


class WatchedStep:
    def __init__(self, model: Watched, step: HashStep, number: int) -> None:
        self._model = model
        self._step = step
        self._number = number

    def sample(self) -> None:
        self._step.sample()
        self._model.fail_if_told("sample", self._number)

    def tokens(self) -> list[SampledToken]:
        self._model.fail_if_told("tokens", self._number)
        return self._step.tokens()


def ahead(*, nan_share: float = 0.0) -> tuple[Engine, Watched]:
    blocks = make_block_manager(num_blocks=200)
    model = Watched(HashModel(blocks, nan_share=nan_share))
    return make_engine(model, block_manager=blocks, runs_ahead=True), model


def letters(key: int, *, max_tokens: int = 12, n: int = 1) -> EngineRequest:
    """Other text for each key."""
    sampling = SamplingParams(temperature=1, seed=key, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(key=key, prompt=PromptInputs((97, 98, 99)), sampling=sampling, n=n)


def undisturbed(*requests: EngineRequest) -> dict[tuple[int, int], GenerationDelta]:
    blocks = make_block_manager(num_blocks=200)
    engine = make_engine(HashModel(blocks), block_manager=blocks)
    for request in requests:
        engine.add(request)
    return run(engine)


def test_a_step_begins_before_the_tokens_of_the_last_one_are_known() -> None:
    engine, model = ahead()
    engine.add(letters(0))
    assert engine.step() == []  # the prompt is under way
    (output,) = engine.step()
    assert len(output.deltas[0].token_ids) == 1
    assert [(s.start, s.end) for b in model.batches for s in b.scheduled] == [(0, 3), (3, 4)]
    assert run(engine)[0, 0].token_ids == undisturbed(letters(0))[0, 0].token_ids[1:]


def test_nothing_is_computed_after_the_last_token_that_max_tokens_allows() -> None:
    engine, model = ahead()
    engine.add(letters(0, max_tokens=4))
    run(engine)
    assert [(s.start, s.end) for b in model.batches for s in b.scheduled] == [
        (0, 3),
        *((i, i + 1) for i in range(3, 6)),
    ]


def test_a_request_for_its_prompt_alone_computes_no_more() -> None:
    engine, model = ahead()
    engine.add(letters(0, max_tokens=0))
    assert run(engine)[0, 0].finish_reason == "length"
    assert len(model.batches) == 1


def test_what_was_computed_after_an_unforeseen_end_is_left_behind() -> None:
    engine = make_engine(ScriptedRunner("Paris"), runs_ahead=True)
    engine.add(make_request(0))
    engine.add(make_request(1, stop=("r",)))
    assert {key: r.text for (key, _), r in run(engine).items()} == {0: "Paris", 1: "Pa"}
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_siblings_share_a_prompt_that_is_still_under_way() -> None:
    engine = make_engine(ScriptedRunner("Paris"), runs_ahead=True)
    engine.add(make_request(prompt="what is the capital", n=4))
    results = run(engine)
    assert [results[0, index].cached_tokens for index in range(4)] == [0, 16, 16, 16]


def test_a_token_that_the_first_search_missed_is_computed_again() -> None:
    """Row by row: others go on from the step that was begun with a wrong token for one."""
    requests = [letters(key) for key in range(4)]
    engine, model = ahead(nan_share=0.3)
    blocks = make_block_manager(num_blocks=200)
    in_turn = make_engine(HashModel(blocks, nan_share=0.3), block_manager=blocks)
    for request in requests:
        engine.add(request)
        in_turn.add(request)
    assert run(engine) == run(in_turn)
    computed = [(s.sequence.arrival, s.start) for b in model.batches for s in b.scheduled]
    assert len(computed) > len(set(computed))


def test_constrained_text_is_what_it_would_be() -> None:
    engine, _ = ahead()
    for key in range(6):
        request = make_request(key, prompt="abc ca abc ", constraints=(OneOf(*WORDS),))
        engine.add(replace(request, sampling=SamplingParams(seed=key)))
    results = run(engine)
    assert len({result.text for result in results.values()}) == len(WORDS)
    assert {result.text for result in results.values()} <= set(WORDS)


def outputs_of(engine: Engine) -> tuple[dict[int, tuple[int, ...]], list[StepOutput]]:
    """Token ids by key, and the failures."""
    tokens: dict[int, tuple[int, ...]] = {}
    failures = []
    for _ in range(200):
        if not engine.has_work:
            break
        for output in engine.step():
            for delta in output.deltas:
                tokens[output.key] = tokens.get(output.key, ()) + delta.token_ids
            failures += [output] if output.error else []
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    return tokens, failures


PHASES = ("begin", "sample", "tokens")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_out_of_memory_anywhere_costs_the_newest_request_and_the_others_no_token(
    phase: str, step: int
) -> None:
    engine, model = ahead()
    model.failures[phase, step] = MemoryError()
    requests = [letters(0, n=2), letters(1), letters(2)]
    for request in requests:
        engine.add(request)
    tokens, (failure,) = outputs_of(engine)
    assert failure.key == 2
    assert "ran out of memory" in str(failure.error)
    expected = undisturbed(*requests)
    assert tokens[1] == expected[1, 0].token_ids
    assert sorted(tokens[0]) == sorted(expected[0, 0].token_ids + expected[0, 1].token_ids)


@pytest.mark.parametrize("phase", PHASES)
def test_a_failed_step_ends_its_own_requests_and_the_engine_goes_on(
    phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, model = ahead()
    model.failures[phase, 4] = RuntimeError("lost")
    engine.add(letters(0))
    engine.add(letters(1))
    with caplog.at_level(logging.CRITICAL):
        for _ in range(3):
            engine.step()
        engine.add(letters(2))
        tokens, failures = outputs_of(engine)
    # The one that came last is in the fourth step with its prompt, unless it came a step later.
    assert {f.key for f in failures} == {0, 1, 2}
    assert tokens.keys() <= {0, 1}
    engine.add(letters(3))
    assert outputs_of(engine)[0][3] == undisturbed(letters(3))[3, 0].token_ids
    assert engine.stats.num_failed_steps_in_a_row == 0


@settings(deadline=None, max_examples=60)
@given(
    windows=st.sampled_from([(None,), (None, 8), (3, 9)]),
    num_spare_blocks=st.integers(0, 40),
    max_num_seqs=st.integers(1, 5),
    chunk_size=st.integers(1, 24),
    requests=REQUESTS,
    aborts=st.lists(st.integers(0, 30), max_size=3),
    nan_share=st.sampled_from([0.0, 0.0, 0.2]),
)
def test_no_text_depends_on_running_ahead_and_no_block_is_lost(
    windows: tuple[int | None, ...],
    num_spare_blocks: int,
    max_num_seqs: int,
    chunk_size: int,
    requests: list[tuple[str, SamplingParams, int]],
    aborts: list[int],
    nan_share: float,
) -> None:
    """Any requests on any pool, some of which end in mid-flight or lose their blocks."""
    sizing = make_block_manager(num_blocks=0, windows=windows)
    num_blocks = sizing.blocks_for(64, chunk_size=chunk_size) + num_spare_blocks
    results = []
    for runs_ahead in (False, True):
        blocks = make_block_manager(num_blocks=num_blocks, windows=windows)
        engine = make_engine(
            HashModel(blocks, windows, nan_share=nan_share),
            block_manager=blocks,
            max_num_seqs=max_num_seqs,
            prefill_chunk_size=chunk_size,
            runs_ahead=runs_ahead,
        )
        results.append(run_and_abort(engine, requests, aborts))
        assert blocks.num_free_blocks == num_blocks
    assert results[0] == results[1]
