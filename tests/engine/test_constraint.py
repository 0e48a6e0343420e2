"""Constraints in sampler and engine, with a grammar small enough to see through."""

import threading
from collections.abc import Sequence
from copy import copy
from typing import Self

import pytest
import torch

from gemma_serve.engine import constraint as constraint_module
from gemma_serve.engine.constraint import MaskThreads
from gemma_serve.engine.engine import Engine
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import FinishReason, SamplingParams
from tests.engine.builders import (
    EOS,
    make_block_manager,
    make_engine,
    make_request,
    spell,
)
from tests.engine.test_engine import run
from tests.engine.test_sampler import make_sampler
from tests.engine.whole_steps import WholeStepRunner


class OneOf:
    """Allows the spellings of ``words``; EOS after one of them."""

    def __init__(self, *words: str, eos: int = EOS) -> None:
        self._left = [spell(word) for word in words]
        self._eos = eos

    def allowed_tokens(self) -> bytes | None:
        ids = {word[0] if word else self._eos for word in self._left}
        return sum(1 << token_id for token_id in ids).to_bytes(32, "little") if ids else None

    def accept(self, token_id: int) -> None:
        self._left = [word[1:] for word in self._left if word and word[0] == token_id]

    def num_acceptable(self, token_ids: Sequence[int]) -> int:
        ahead = self.fork()
        for index, token_id in enumerate(token_ids):
            mask = OneOf.allowed_tokens(ahead)
            if mask is None or not mask[token_id // 8] >> token_id % 8 & 1:
                return index
            ahead.accept(token_id)
        return len(token_ids)

    def fork(self) -> Self:
        twin = copy(self)
        twin._left = self._left.copy()
        return twin

    @property
    def is_over(self) -> bool:
        return self._left == [()]


class Failing(OneOf):
    def allowed_tokens(self) -> bytes | None:
        raise RuntimeError("no grammar")


class Slow(OneOf):
    """Waits for the test before it answers."""

    def __init__(self, *words: str) -> None:
        super().__init__(*words)
        self.may_answer = threading.Event()

    def allowed_tokens(self) -> bytes | None:
        self.may_answer.wait(10)
        return super().allowed_tokens()


class RandomRunner(WholeStepRunner):
    """A model whose logits are noise, and the real sampler."""

    def __init__(self) -> None:
        self._sampler = make_sampler(256, forbidden=[0])
        self._generator = torch.Generator().manual_seed(0)

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        states = batch.sampling_states
        if not states:
            return []
        logits = torch.randn(len(states), 256, generator=self._generator)
        return self._sampler.sample(logits, states)


def sample(
    sampler: Sampler, logits: torch.Tensor, *constraints: OneOf | None, **params: object
) -> list[int | None]:
    states = [
        SamplingState(
            SamplingParams(**params),  # type: ignore[arg-type]  # a test's own keywords
            seed=row,
            prompt_token_ids=(),
            constraint=constraint,
        )
        for row, constraint in enumerate(constraints)
    ]
    return [token.token_id for token in sampler.sample(logits, states)]


@pytest.mark.parametrize("vocab_size", [256, 300, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_only_allowed_tokens_are_sampled_whatever_the_model_prefers(
    vocab_size: int, dtype: torch.dtype, top_k: int | None
) -> None:
    logits = torch.zeros(12, vocab_size, dtype=dtype)
    logits[:, ord("x")] = 50
    constraints = [OneOf("a", "b") if row % 3 else None for row in range(12)]
    token_ids = sample(make_sampler(vocab_size), logits, *constraints, top_k=top_k)
    for token_id, constraint in zip(token_ids, constraints, strict=True):
        assert token_id in ({ord("x")} if constraint is None else {ord("a"), ord("b")})


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": ((ord("x"), 100.0),)}, {"repetition_penalty": 0.5}, {"presence_penalty": -2.0}],
)
def test_no_bias_or_penalty_lifts_a_token_that_is_not_allowed(params: dict[str, object]) -> None:
    (token_id,) = sample(make_sampler(256), torch.zeros(1, 256), OneOf("a"), **params)
    assert token_id == ord("a")


def test_forbidden_token_stays_forbidden_when_the_grammar_allows_it() -> None:
    sampler = make_sampler(256, forbidden=[ord("a")])
    assert sample(sampler, torch.zeros(2, 256), OneOf("a", "b"), OneOf("a")) == [ord("b"), None]


def test_row_without_an_allowed_token_gets_none_and_the_others_theirs() -> None:
    logits = torch.zeros(3, 256)
    assert sample(make_sampler(256), logits, OneOf("a"), OneOf(), OneOf("b")) == [97, None, 98]


def test_failing_constraint_fails_its_row_alone(caplog: pytest.LogCaptureFixture) -> None:
    token_ids = sample(make_sampler(256), torch.zeros(2, 256), Failing("a"), OneOf("b"))
    assert token_ids == [None, ord("b")]
    assert "no grammar" in caplog.text


def test_constraint_that_takes_too_long_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "_MAX_WAIT_S", 0.05)
    slow = Slow("a")
    try:
        assert MaskThreads().start([None, slow]).result() == {1: None}
    finally:
        slow.may_answer.set()


def engine_with(*, num_blocks: int = 100) -> Engine:
    return make_engine(RandomRunner(), block_manager=make_block_manager(num_blocks=num_blocks))


def test_sequence_ends_by_itself_when_its_constraint_is_over() -> None:
    engine = engine_with()
    engine.add(make_request(constraints=(OneOf("true"),), ignore_eos=True))
    delta = run(engine)[0, 0]
    assert (delta.text, delta.finish_reason) == ("true", FinishReason.STOP)
    assert delta.token_ids == spell("true")


def test_text_that_may_go_on_ends_with_eos() -> None:
    words = ("no", "none", "nonetheless")
    engine = engine_with()
    for key in range(20):
        engine.add(make_request(key, constraints=(OneOf(*words),)))
    texts = [delta.text for delta in run(engine, max_steps=400).values()]
    assert set(texts) == set(words)


def test_each_of_n_sequences_has_its_own_constraint() -> None:
    engine = engine_with()
    engine.add(make_request(n=2, constraints=(OneOf("left"), OneOf("right"))))
    deltas = run(engine)
    assert [deltas[0, index].text for index in (0, 1)] == ["left", "right"]


def test_stop_string_ends_a_constrained_sequence() -> None:
    engine = engine_with()
    engine.add(make_request(constraints=(OneOf("left right"),), stop=(" ",)))
    delta = run(engine)[0, 0]
    assert (delta.text, delta.finish_reason) == ("left", FinishReason.STOP)


def test_preempted_sequence_goes_on_with_its_constraint() -> None:
    long = "a rather long text that must come out whole"
    engine = make_engine(
        RandomRunner(), block_manager=make_block_manager(num_blocks=17), max_model_len=64
    )
    for key in range(3):
        engine.add(make_request(key, constraints=(OneOf(long),)))
    assert [delta.text for delta in run(engine, max_steps=400).values()] == [long] * 3


def test_dead_end_ends_its_request_with_an_error_and_no_other() -> None:
    engine = engine_with()
    # Of prompts shorter than a block, none waits for another's.
    both = (OneOf("\0"), OneOf("yes"))  # 0 is forbidden
    engine.add(make_request(0, prompt="hey", constraints=both, n=2))
    engine.add(make_request(1, prompt="hey", constraints=(OneOf("yes"),)))
    outputs = engine.step()
    (error,) = [output.error for output in outputs if output.error is not None]
    assert isinstance(error, InvalidRequestError)
    assert "format" in str(error)
    assert engine.stats.num_free_blocks < engine.stats.num_blocks
    assert _texts_of(engine, key=1) == "es"
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def _texts_of(engine: Engine, *, key: int) -> str:
    outputs = [output for _ in range(10) for output in engine.step() if output.key == key]
    return "".join(delta.text for output in outputs for delta in output.deltas)
