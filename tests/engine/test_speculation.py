"""Drafts change how many steps a text takes, and nothing else."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.engine.drafter import Drafter
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.model_runner import ModelRunner
from gemma_serve.engine.prompt_lookup import LookupDrafter
from gemma_serve.engine.sequence import ImageSpan, PromptInputs
from gemma_serve.engine.speculation import Speculation, best_count
from gemma_serve.generation import FinishReason, GenerationDelta, SamplingParams
from tests.engine.builders import (
    EOS,
    ScriptedRunner,
    SpellingRunner,
    make_block_manager,
    make_engine,
    make_request,
    make_speculation,
    spell,
)
from tests.engine.hash_model import HashModel, make_drafter
from tests.engine.test_constraint import OneOf
from tests.engine.test_engine import run

ECHO = "the quick brown fox jumps over the lazy dog"


def speculating(
    runner: ModelRunner, *, speculation: Speculation | None = None, max_model_len: int = 200
) -> Engine:
    return make_engine(
        runner, speculation=speculation or make_speculation(), max_model_len=max_model_len
    )


def test_text_that_repeats_its_prompt_takes_fewer_steps() -> None:
    runner = ScriptedRunner(ECHO)
    engine = speculating(runner)
    engine.add(make_request(prompt=ECHO))
    result = run(engine)[0, 0]
    assert (result.text, result.finish_reason) == (ECHO, FinishReason.STOP)
    num_prefill_steps = 3
    # Three letters by themselves, five in each step with drafts, and the end of the turn.
    assert len(runner.batches) == num_prefill_steps + 2 + 9
    assert engine.stats.num_accepted_tokens == 32
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_text_that_parts_from_its_prompt_goes_its_own_way() -> None:
    said = ECHO.replace("brown", "black")
    engine = speculating(ScriptedRunner(said))
    engine.add(make_request(prompt=ECHO))
    assert run(engine)[0, 0].text == said
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_drafted_tokens


def test_stop_string_in_mid_draft_ends_the_text_there() -> None:
    engine = speculating(ScriptedRunner(ECHO))
    engine.add(make_request(prompt=ECHO, stop=("jum",)))
    result = run(engine)[0, 0]
    assert (result.text, result.finish_reason) == ("the quick brown fox ", FinishReason.STOP)
    assert bytes(result.token_ids).decode() == "the quick brown fox jum"
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_max_tokens_in_mid_draft_ends_the_text_there(max_tokens: int) -> None:
    engine = speculating(ScriptedRunner(ECHO))
    engine.add(make_request(prompt=ECHO, max_tokens=max_tokens))
    result = run(engine)[0, 0]
    assert (result.text, result.finish_reason) == (ECHO[:max_tokens], FinishReason.LENGTH)


def test_no_draft_lies_beyond_the_end_of_the_context() -> None:
    runner = ScriptedRunner(ECHO)
    engine = speculating(runner, max_model_len=len(ECHO) + 9)
    engine.add(make_request(prompt=ECHO))
    assert run(engine)[0, 0].text == ECHO[:9]
    assert max(s.end for batch in runner.batches for s in batch.scheduled) == len(ECHO) + 8


def test_token_that_ends_the_turn_is_never_drafted() -> None:
    runner = ScriptedRunner("abcd")
    engine = speculating(runner)
    token_ids = (*spell("abcd"), EOS, *spell("more"))
    engine.add(EngineRequest(key=0, prompt=PromptInputs(token_ids), sampling=SamplingParams()))
    assert run(engine)[0, 0].text == "abcd"
    drafts = [s.drafts for batch in runner.batches for s in batch.scheduled if s.drafts]
    assert drafts == [spell("d")]


def test_tokens_that_cannot_be_sampled_are_never_drafted() -> None:
    """An image's soft tokens may lie beyond the vocabulary, where penalties would not find them."""
    runner = ScriptedRunner("abcdef")
    engine = speculating(runner)
    prompt = PromptInputs((*spell("abcd"), 999, 999, 7), (ImageSpan(4, 2, b"view"),))
    engine.add(EngineRequest(key=0, prompt=prompt, sampling=SamplingParams()))
    assert run(engine)[0, 0].text == "abcdef"
    drafts = [s.drafts for batch in runner.batches for s in batch.scheduled if s.drafts]
    assert drafts == [spell("d")]


def test_request_may_go_without() -> None:
    runner = ScriptedRunner(ECHO)
    engine = speculating(runner)
    request = make_request(prompt=ECHO)
    engine.add(replace(request, sampling=replace(request.sampling, speculation=False)))
    assert run(engine)[0, 0].text == ECHO
    assert engine.stats.num_drafted_tokens == 0


def test_logprobs_come_with_every_token() -> None:
    engine = make_engine(
        SpellingRunner(ECHO, ((7, -2.0),)), speculation=make_speculation(), max_model_len=200
    )
    request = make_request(prompt=ECHO)
    engine.add(replace(request, sampling=replace(request.sampling, logprobs=1)))
    result = run(engine)[0, 0]
    assert tuple(entry.chosen.token_id for entry in result.logprobs) == result.token_ids
    assert engine.stats.num_accepted_tokens > 0


def test_drafts_take_only_rows_that_nobody_else_takes() -> None:
    runner = ScriptedRunner(ECHO)
    engine = speculating(runner, speculation=make_speculation(max_drafts=4, max_rows=7))
    for key in range(3):
        engine.add(make_request(key, prompt=f"{key}{ECHO}"))
    assert {result.text for result in run(engine).values()} == {ECHO}
    num_rows = [sum(s.num_sampled for s in batch.scheduled) for batch in runner.batches]
    assert max(num_rows) == 7


def test_drafts_take_only_blocks_that_nobody_else_needs() -> None:
    """Nobody loses blocks to a guess: steps without room for one do without."""
    runner = ScriptedRunner("abcdefghabcdefgh")
    blocks = make_block_manager(num_blocks=13, block_size=4)
    engine = make_engine(
        runner,
        block_manager=blocks,
        max_model_len=52,
        enable_prefix_cache=False,
        speculation=make_speculation(max_drafts=9),
    )
    for key in range(2):
        engine.add(make_request(key, prompt="abcdefgh"))
    assert {result.text for result in run(engine).values()} == {"abcdefghabcdefgh"}
    computed = [(s.sequence.request_key, s.start) for b in runner.batches for s in b.scheduled]
    assert len(computed) == len(set(computed))  # nobody was preempted
    assert engine.stats.num_accepted_tokens > 0


def test_failed_draft_leaves_nothing_in_the_prefix_cache() -> None:
    runner = ScriptedRunner("abcdefgX" + "y" * 20)
    blocks = make_block_manager(num_blocks=40, block_size=4)
    engine = make_engine(
        runner, block_manager=blocks, max_model_len=64, speculation=make_speculation(max_drafts=8)
    )
    engine.add(make_request(0, prompt="abcdefghijklmnopqrstuvw!"))
    run(engine)
    # What was drafted, computed and found wrong: the prompt's text once more.
    engine.add(make_request(1, prompt="abcdefghijklmnopqrstuvw!abcdefghijklmnopq", max_tokens=1))
    result = run(engine)[1, 0]
    assert result.cached_tokens == 28  # up to "abcd"; "efgX" was said, not "efgh"


@pytest.mark.parametrize(
    ("hit_rates", "cost", "num_decoding", "expected"),
    [
        ((0.9, 0.9), 0.0, 1, 8),
        ((0.9, 0.9), 0.2, 1, 7),
        ((0.5, 0.5), 0.1, 1, 2),
        ((0.1, 0.8), 0.2, 1, 0),
        ((0.0, 0.9), 0.0, 1, 0),
        ((0.9, 0.9), 0.0, 8, 8),
        ((0.9, 0.9), 0.1, 8, 2),
        ((0.9, 0.9), 0.12, 8, 0),
    ],
)
def test_as_many_are_drafted_as_make_the_step_faster(
    hit_rates: tuple[float, float], cost: float, num_decoding: int, expected: int
) -> None:
    assert best_count(hit_rates, 8, cost=cost, num_decoding=num_decoding) == expected


WORDS = ("abc abc abc abc!", "abc abc abc ca!")


@pytest.mark.parametrize("seed", range(6))
def test_constrained_text_is_what_it_would_be(seed: int) -> None:
    sampling = SamplingParams(seed=seed)
    texts = []
    for speculation in (None, make_speculation()):
        blocks = make_block_manager()
        engine = make_engine(HashModel(blocks), block_manager=blocks, speculation=speculation)
        request = make_request(prompt="abc ca abc ", constraints=(OneOf(*WORDS),))
        engine.add(replace(request, sampling=sampling))
        texts.append(run(engine)[0, 0])
    assert texts[0] == texts[1]
    assert texts[0].text in WORDS
    assert engine.stats.num_accepted_tokens > 0


SAMPLINGS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([None, 2]),
    seed=st.integers(0, 5),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    logit_bias=st.sampled_from([(), ((ord("a"), 2.0),)]),
    stop=st.sampled_from([(), ("cab",), ("b a", "cc")]),
    stop_token_ids=st.sampled_from([(), (ord("c"),)]),
    min_tokens=st.sampled_from([0, 0, 7]),
    banned_token_sequences=st.sampled_from([(), (spell("ab"), spell("c"))]),
    logprobs=st.sampled_from([None, 2]),
)
REQUESTS = st.lists(
    st.tuples(st.text("abc ", min_size=1, max_size=30), SAMPLINGS, st.integers(1, 2)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=40)
@given(
    windows=st.sampled_from([(None,), (None, 8), (3, 9)]),
    num_spare_blocks=st.integers(0, 40),
    max_num_seqs=st.integers(1, 5),
    max_drafts=st.integers(1, 9),
    chunk_size=st.integers(10, 24),
    requests=REQUESTS,
    aborts=st.lists(st.integers(0, 30), max_size=3),
    looks_up=st.booleans(),
    noise=st.sampled_from([None, 0.0, 1.0]),
    draft_windows=st.sampled_from([(None,), (None, 9), (5, 6)]),
    num_draft_blocks=st.integers(0, 60),
)
def test_no_text_depends_on_drafts_and_no_block_is_lost(
    windows: tuple[int | None, ...],
    num_spare_blocks: int,
    max_num_seqs: int,
    max_drafts: int,
    chunk_size: int,
    requests: list[tuple[str, SamplingParams, int]],
    aborts: list[int],
    looks_up: bool,
    noise: float | None,
    draft_windows: tuple[int | None, ...],
    num_draft_blocks: int,
) -> None:
    """Any requests on any pool, some of which end in mid-flight; drafts by look-up, by a model that
    agrees more or less, or both.
    """
    sizing = make_block_manager(num_blocks=0, windows=windows)
    num_blocks = sizing.blocks_for(64, chunk_size=chunk_size) + num_spare_blocks
    draft_blocks = make_block_manager(num_blocks=num_draft_blocks, windows=draft_windows)
    drafters: list[Drafter] = [LookupDrafter()] if looks_up or noise is None else []
    if noise is not None:
        model = HashModel(draft_blocks, draft_windows, noise=noise)
        drafters.append(make_drafter(model, draft_blocks, prefill_chunk_size=chunk_size))
    speculating = make_speculation(*drafters, max_drafts=max_drafts, max_rows=12)
    results = []
    for speculation in (None, speculating):
        blocks = make_block_manager(num_blocks=num_blocks, windows=windows)
        engine = make_engine(
            HashModel(blocks, windows),
            block_manager=blocks,
            max_num_seqs=max_num_seqs,
            prefill_chunk_size=chunk_size,
            speculation=speculation,
        )
        results.append(run_and_abort(engine, requests, aborts))
        assert blocks.num_free_blocks == num_blocks
    assert results[0] == results[1]
    assert draft_blocks.num_free_blocks == num_draft_blocks
    assert len(speculating._sources) == len(drafters)  # none has failed


def run_and_abort(
    engine: Engine, requests: Seq[tuple[str, SamplingParams, int]], aborts: Seq[int]
) -> dict[tuple[int, int], GenerationDelta]:
    """The merged deltas of ``requests``, beside which others are aborted after so many steps."""
    for key, (prompt, sampling, n) in enumerate(requests):
        engine.add(
            EngineRequest(key=key, prompt=PromptInputs(spell(prompt)), sampling=sampling, n=n)
        )
    aborted = {len(requests) + i: num_steps for i, num_steps in enumerate(aborts)}
    for key in aborted:
        engine.add(make_request(key, prompt="abc abc abc", max_tokens=40))
    merged: dict[tuple[int, int], GenerationDelta] = {}
    for num_steps in range(2000):
        for key, num_steps_before in aborted.items():
            if num_steps == num_steps_before:
                engine.abort(key)
        if not engine.has_work:
            return merged
        for output in engine.step():
            for delta in output.deltas if output.key not in aborted else ():
                # How much was cached depends on who came when.
                delta = replace(delta, cached_tokens=0)
                place = (output.key, delta.index)
                merged[place] = merged[place] + delta if place in merged else delta
    raise AssertionError("the engine did not finish")
