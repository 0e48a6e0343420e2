"""The step: schedule, run, take the tokens in, hand out text.

Where a device works by itself, the engine runs ahead of it: it begins a step before it looks at the
tokens of the one before. The device then goes on without waiting while the host takes those tokens
in and hands out text. What it computes ahead for a sequence that turns out to have ended is left
behind.
"""

import logging
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import count, islice, zip_longest
from operator import add
from time import perf_counter
from typing import Final

from gemma_serve.engine.block_chain import BlockChain, ImageContent
from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.constraint import TokenConstraint
from gemma_serve.engine.deltas import take_in
from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.engine.model_runner import ModelRunner, SampledToken, StepUnderWay
from gemma_serve.engine.prompt_scores import PromptScores
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from gemma_serve.engine.sequence import PromptInputs, Sequence
from gemma_serve.engine.stats import EngineStats
from gemma_serve.engine.vocabulary import Vocabulary
from gemma_serve.errors import GemmaServeError, GenerationError, InvalidRequestError
from gemma_serve.generation import GenerationDelta, SamplingParams

logger = logging.getLogger(__name__)

_MODEL_FAILED: Final = "The model failed while it worked on this request. Please try again."
_OUT_OF_MEMORY: Final = (
    "The server ran out of memory while it worked on this request. Please try again later, or with "
    "a shorter prompt."
)
_NO_TOKEN_POSSIBLE: Final = (
    "The answer can be neither continued nor ended: its format and the request's other parameters "
    "together rule every token out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt and how often and in which way to go on from it.

    ``key`` is unique in the engine, unlike the request ids that clients send.
    """

    key: int
    prompt: PromptInputs
    sampling: SamplingParams
    n: int = 1
    user: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    constraints: tuple[TokenConstraint, ...] = ()
    """One for each of the ``n``, or none at all."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought for one request: deltas, or the error that ended it."""

    key: int
    deltas: tuple[GenerationDelta, ...] = ()
    error: GemmaServeError | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """One that has begun."""

    batch: ScheduledBatch
    under_way: StepUnderWay
    began_at: float
    """On the clock of ``perf_counter``."""

    @property
    def stands(self) -> bool:
        """Whether anything that it brings still counts."""
        return any(scheduled.stands for scheduled in self.batch.scheduled)


class Engine:
    """Owns requests from admission to their last token. Synchronous; one thread uses it."""

    def __init__(
        self,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        block_manager: BlockManager,
        vocabulary: Vocabulary,
        max_model_len: int,
        enable_prefix_cache: bool = True,
        runs_ahead: bool = False,
    ) -> None:
        """``runs_ahead``: not if the scheduler speculates, for which it needs the tokens."""
        self._runner = runner
        self._scheduler = scheduler
        self._block_manager = block_manager
        self._vocabulary = vocabulary
        self._max_model_len = max_model_len
        self._enable_prefix_cache = enable_prefix_cache
        self._runs_ahead = runs_ahead
        self._last_step: _Step | None = None
        """Whose tokens have not been taken in."""
        self._waited_at: float | None = None
        """When the device was done with the last step, if that was waited for."""
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0
        self._unfinished: dict[int, list[Sequence]] = {}
        self._arrivals = count()
        self._num_failed_steps_in_a_row = 0

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def has_work(self) -> bool:
        return bool(self._unfinished)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._block_manager.num_free_blocks,
            num_blocks=self._block_manager.num_blocks,
            num_failed_steps_in_a_row=self._num_failed_steps_in_a_row,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def add(self, request: EngineRequest) -> list[StepOutput]:
        """Queue a request whose prompt is shorter than ``max_model_len``.

        Returns the failure of one that cannot even begin, else nothing.
        """
        try:
            chain = self._new_chain(request)
            sequences = [self._new_sequence(request, index, chain) for index in range(request.n)]
        except Exception:
            # The boundary of one request: the engine must outlive it.
            logger.exception("a request could not begin")
            return [StepOutput(request.key, error=GenerationError(_MODEL_FAILED))]
        self._unfinished[request.key] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)
        return []

    def abort(self, key: int) -> None:
        """Drop a request and free its blocks; nothing happens if it has ended already."""
        self._scheduler.remove(self._unfinished.pop(key, []))

    def step(self) -> list[StepOutput]:
        """Compute one step and return what it brought; when running ahead, what the one before
        brought. A failure ends the requests of that step and no others, and where memory did not
        suffice, only the newest of them.
        """
        outputs: list[StepOutput] = []
        step = self._begin(outputs)
        self._end_last_step(step, outputs)
        if step is not None:
            self._sample(step, outputs)
        if not self._runs_ahead:
            self._end_last_step(None, outputs)
        return outputs

    def _begin(self, outputs: list[StepOutput]) -> _Step | None:
        batch = self._scheduler.schedule()
        if batch is None:
            return None
        began_at = perf_counter()
        with self._surviving(outputs, batch):
            return _Step(batch, self._runner.begin(batch), began_at)
        return None

    def _sample(self, step: _Step, outputs: list[StepOutput]) -> None:
        """Nothing waits for what is chosen, or for what was computed for nobody."""
        if not step.stands:
            return
        with self._surviving(outputs, step.batch):
            step.under_way.sample()
            self._last_step = step

    def _end_last_step(self, following: _Step | None, outputs: list[StepOutput]) -> None:
        """Wait for its tokens. ``following``: the step that has begun since."""
        step, self._last_step = self._last_step, None
        if step is None or not step.stands:
            return
        with self._surviving(outputs, step.batch, *([following.batch] if following else [])):
            sampled_tokens = step.under_way.tokens()
            self._observe_duration(step)
            outputs += self._take_in(step, sampled_tokens, following)
            self._num_failed_steps_in_a_row = 0

    def _observe_duration(self, step: _Step) -> None:
        """Let the scheduler know how long the device took for a step that has just been done.

        A step that samples nothing is not waited for, so nobody knows when the next began.
        """
        waited_at, self._waited_at = self._waited_at, None
        if step.batch.sampling:
            self._waited_at = perf_counter()
            if waited_at is not None:
                began_at = max(step.began_at, waited_at)
                self._scheduler.observe(step.batch, self._waited_at - began_at)

    @contextmanager
    def _surviving(
        self, outputs: list[StepOutput], batch: ScheduledBatch, *following: ScheduledBatch
    ) -> Iterator[None]:
        """The boundary between one step and the next: the engine must outlive any request."""
        try:
            yield
        except MemoryError as error:
            for later in (*following, batch):
                self._scheduler.take_back(later.scheduled)
            outputs += self._shed_newest(batch, error)
        except Exception:
            logger.exception("a step of %d sequences failed", len(batch.scheduled))
            self._num_failed_steps_in_a_row += 1
            outputs += self._fail({s.sequence.request_key for s in batch.scheduled})

    def _new_chain(self, request: EngineRequest) -> BlockChain | None:
        """Names the prompt's blocks: a microsecond each, once for all sequences."""
        if not self._enable_prefix_cache:
            return None
        prompt = request.prompt
        chain = BlockChain(
            block_size=self._block_manager.block_size,
            images=[ImageContent(i.start, i.end, i.digest) for i in prompt.images],
            salt=request.cache_salt,
        )
        chain.extend(prompt.token_ids, len(prompt.token_ids))
        return chain

    def _new_sequence(
        self, request: EngineRequest, index: int, chain: BlockChain | None
    ) -> Sequence:
        sampling, prompt = request.sampling, request.prompt
        num_prompt_tokens = len(prompt.token_ids)
        max_tokens = self._max_model_len if (m := sampling.max_tokens) is None else m
        vocabulary = self._vocabulary
        own_stops = () if sampling.ignore_eos else vocabulary.stop_strings
        own_stop_ids = frozenset() if sampling.ignore_eos else vocabulary.eos_token_ids
        stop_token_ids = own_stop_ids.union(sampling.stop_token_ids)
        return Sequence(
            request_key=request.key,
            index=index,
            prompt=prompt,
            sampling_state=SamplingState(
                sampling,
                seed=SamplingState.derive_seed(sampling.seed, index),
                prompt_token_ids=prompt.token_ids,
                constraint=request.constraints[index] if request.constraints else None,
                ending_token_ids=stop_token_ids,
            ),
            detokenizer=Detokenizer(
                vocabulary.token_bytes,
                (*sampling.stop, *own_stops),
                include_stop=sampling.include_stop_str_in_output,
                min_tokens=sampling.min_tokens,
                control_token_names={}
                if sampling.skip_special_tokens
                else vocabulary.control_token_names,
            ),
            stop_token_ids=stop_token_ids,
            max_total_tokens=min(num_prompt_tokens + max_tokens, self._max_model_len),
            block_table=self._block_manager.new_table(chain and chain.copy()),
            arrival=next(self._arrivals),
            token_ids=list(prompt.token_ids),
            user=request.user,
            priority=request.priority,
            prompt_scores=PromptScores(
                num_prompt_tokens=num_prompt_tokens, num_top=sampling.prompt_logprobs
            )
            if sampling.prompt_logprobs is not None and index == 0
            else None,
        )

    def _take_in(
        self, step: _Step, sampled_tokens: Seq[SampledToken], following: _Step | None
    ) -> list[StepOutput]:
        deltas: dict[int, list[GenerationDelta]] = {}
        stuck: set[int] = set()
        finished: list[Sequence] = []
        revised: set[Sequence] = set()
        samples = iter(sampled_tokens)
        for scheduled in step.batch.sampling:
            tokens = tuple(islice(samples, scheduled.num_sampled))
            if not scheduled.stands:  # aborted or preempted while the step was under way
                continue
            key = scheduled.sequence.request_key
            brought = [*self._deltas(scheduled, tokens)]
            if tokens[-1].is_revised:
                revised.add(scheduled.sequence)
            if brought[-1] is None:
                stuck.add(key)
            if of_sequence := [delta for delta in brought if delta is not None]:
                deltas.setdefault(key, []).append(reduce(add, of_sequence))
                if of_sequence[-1].finish_reason is not None:
                    finished.append(scheduled.sequence)
        assert next(samples, None) is None
        if revised and following is not None:
            self._scheduler.take_back(s for s in following.batch.scheduled if s.sequence in revised)
        self._scheduler.mark_computed(step.batch)
        for sequence in finished:
            self._finish(sequence)
        outputs = [StepOutput(key, tuple(of_request)) for key, of_request in deltas.items()]
        return outputs + self._fail(stuck, _NO_TOKEN_POSSIBLE, InvalidRequestError)

    def _deltas(
        self, scheduled: ScheduledSequence, tokens: Seq[SampledToken]
    ) -> Iterator[GenerationDelta | None]:
        """What a step brought for one sequence: tokens up to its end, or to the first that is not
        what was drafted. Those sampled after that one followed something else.
        """
        self._num_drafted_tokens += len(scheduled.drafts)
        for token, draft in zip_longest(tokens, scheduled.drafts):
            delta = take_in(scheduled.sequence, token, self._vocabulary)
            yield delta
            if delta is None or delta.finish_reason is not None or token.token_id != draft:
                return
            self._num_accepted_tokens += 1

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove((sequence,))
        siblings = self._unfinished[sequence.request_key]
        siblings.remove(sequence)
        if not siblings:
            del self._unfinished[sequence.request_key]

    def _shed_newest(self, batch: ScheduledBatch, error: MemoryError) -> list[StepOutput]:
        """Fail the newest request. The others are scheduled again as if nothing had been run."""
        unfinished = [
            s.sequence for s in batch.scheduled if s.sequence.request_key in self._unfinished
        ]
        newest = max(unfinished, key=lambda sequence: sequence.arrival).request_key
        keys = {sequence.request_key for sequence in unfinished}
        logger.error(
            "out of memory in a step of %d requests; the newest fails, so that %d go on. Lower "
            "kv_cache_memory, max_num_seqs or prefill_chunk_size: %s",
            len(keys),
            len(keys) - 1,
            error,
        )
        if keys == {newest}:  # else the next, smaller step may well work
            self._num_failed_steps_in_a_row += 1
        return self._fail({newest}, _OUT_OF_MEMORY)

    def _fail(
        self,
        keys: Collection[int],
        message: str = _MODEL_FAILED,
        kind: type[GemmaServeError] = GenerationError,
    ) -> list[StepOutput]:
        """Those of ``keys`` that have not ended."""
        failing = [key for key in keys if key in self._unfinished]
        for key in failing:
            self.abort(key)
        return [StepOutput(key, error=kind(message)) for key in failing]
