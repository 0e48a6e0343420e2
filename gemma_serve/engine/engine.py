"""The step: schedule, run, take the tokens in, hand out text."""

import logging
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import count, islice, zip_longest
from operator import add
from time import perf_counter
from typing import Final

from gemma_serve.engine.block_chain import BlockChain, ImageContent
from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.constraint import TokenConstraint
from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.engine.model_runner import ModelRunner, SampledToken
from gemma_serve.engine.prompt_scores import PromptScores
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from gemma_serve.engine.sequence import PromptInputs, Sequence
from gemma_serve.engine.speculation import Speculation
from gemma_serve.engine.stats import EngineStats
from gemma_serve.errors import GemmaServeError, GenerationError, InvalidRequestError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    SampledLogprobs,
    SamplingParams,
    TokenLogprob,
)

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
class Vocabulary:
    """What the engine must know of a checkpoint's tokens."""

    token_bytes: Seq[bytes]
    """UTF-8 bytes of every id; empty for control tokens."""
    eos_token_ids: frozenset[int]
    """The ids that end a turn."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a turn of this checkpoint, besides a request's own."""
    control_token_names: Mapping[int, bytes] = field(default_factory=dict)
    """UTF-8 names of the ids that are no text."""


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
        speculation: Speculation | None = None,
    ) -> None:
        """``speculation``: the scheduler's."""
        self._runner = runner
        self._scheduler = scheduler
        self._block_manager = block_manager
        self._vocabulary = vocabulary
        self._max_model_len = max_model_len
        self._enable_prefix_cache = enable_prefix_cache
        self._speculation = speculation
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
        """Compute one step. A failure ends the requests of that step and no others, and where
        memory did not suffice, only the newest of them.
        """
        batch = self._scheduler.schedule()
        if batch is None:
            return []
        try:
            outputs = self._take_in(batch, self._run(batch))
        except MemoryError as error:
            return self._shed_newest(batch, error)
        except Exception:
            # The boundary between one step and the next: the engine must outlive any request.
            logger.exception("a step of %d sequences failed", len(batch.scheduled))
            self._num_failed_steps_in_a_row += 1
            return self._fail({s.sequence.request_key for s in batch.scheduled})
        self._num_failed_steps_in_a_row = 0
        return outputs

    def _run(self, batch: ScheduledBatch) -> list[SampledToken]:
        started_at = perf_counter()
        sampled_tokens = self._runner.run(batch)
        if self._speculation is not None and all(s.decodes for s in batch.scheduled):
            self._speculation.observe(
                num_decoding=len(batch.scheduled),
                num_drafts=batch.num_drafts,
                duration_s=perf_counter() - started_at,
            )
        return sampled_tokens

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
        self, batch: ScheduledBatch, sampled_tokens: Seq[SampledToken]
    ) -> list[StepOutput]:
        deltas: dict[int, list[GenerationDelta]] = {}
        stuck: set[int] = set()
        finished: list[Sequence] = []
        samples = iter(sampled_tokens)
        for scheduled in batch.sampling:
            key = scheduled.sequence.request_key
            brought = [*self._deltas(scheduled, islice(samples, scheduled.num_sampled))]
            if brought[-1] is None:
                stuck.add(key)
            if of_sequence := [delta for delta in brought if delta is not None]:
                deltas.setdefault(key, []).append(reduce(add, of_sequence))
                if of_sequence[-1].finish_reason is not None:
                    finished.append(scheduled.sequence)
        assert next(samples, None) is None
        self._scheduler.mark_computed(batch)
        for sequence in finished:
            self._finish(sequence)
        outputs = [StepOutput(key, tuple(of_request)) for key, of_request in deltas.items()]
        return outputs + self._fail(stuck, _NO_TOKEN_POSSIBLE, InvalidRequestError)

    def _deltas(
        self, scheduled: ScheduledSequence, sampled: Iterator[SampledToken]
    ) -> Iterator[GenerationDelta | None]:
        """What a step brought for one sequence: tokens up to its end, or to the first that is not
        what was drafted. Those sampled after that one followed something else.
        """
        of_sequence = tuple(sampled)
        self._num_drafted_tokens += len(scheduled.drafts)
        for token, draft in zip_longest(of_sequence, scheduled.drafts):
            delta = self._delta(scheduled.sequence, token)
            yield delta
            if delta is None or delta.finish_reason is not None or token.token_id != draft:
                return
            self._num_accepted_tokens += 1

    def _delta(self, sequence: Sequence, sampled: SampledToken) -> GenerationDelta | None:
        """The next token of a sequence, taken in; ``None``: none was possible."""
        is_first = len(sequence.token_ids) == len(sequence.prompt.token_ids)
        if len(sequence.token_ids) >= sequence.max_total_tokens:  # only the prompt was asked for
            delta = GenerationDelta(sequence.index, "", (), FinishReason.LENGTH)
        elif sampled.token_id is None:
            return None
        else:
            delta = self._advance(sequence, sampled.token_id, self._logprobs(sampled))
        if not is_first:
            return delta
        return replace(
            delta,
            cached_tokens=sequence.num_cached_tokens,
            prompt_logprobs=self._take_prompt_logprobs(sequence),
        )

    def _advance(
        self, sequence: Sequence, token_id: int, logprobs: tuple[SampledLogprobs, ...]
    ) -> GenerationDelta:
        """Append a sampled token and say what became final by it."""
        sequence.token_ids.append(token_id)
        sequence.sampling_state.append(token_id)
        finish_reason, stop_reason = None, None
        if token_id in sequence.stop_token_ids:
            text, finish_reason = sequence.detokenizer.flush(), FinishReason.STOP
            stop_reason = _asked_for(token_id, self._vocabulary.eos_token_ids)
        else:
            text = sequence.detokenizer.append((token_id,))
            if (matched := sequence.detokenizer.matched_stop) is not None:
                finish_reason = FinishReason.STOP
                stop_reason = _asked_for(matched, self._vocabulary.stop_strings)
            elif sequence.sampling_state.is_over:
                text, finish_reason = text + sequence.detokenizer.flush(), FinishReason.STOP
            elif len(sequence.token_ids) >= sequence.max_total_tokens:
                text, finish_reason = text + sequence.detokenizer.flush(), FinishReason.LENGTH
        return GenerationDelta(
            sequence.index, text, (token_id,), finish_reason, stop_reason, logprobs=logprobs
        )

    def _logprobs(self, sampled: SampledToken) -> tuple[SampledLogprobs, ...]:
        """Of one token; nothing if they were not asked for."""
        if not sampled.logprobs:
            return ()
        token_bytes = self._vocabulary.token_bytes
        chosen, *top = (TokenLogprob(i, logprob, token_bytes[i]) for i, logprob in sampled.logprobs)
        return (SampledLogprobs(chosen, tuple(top)),)

    def _take_prompt_logprobs(self, sequence: Sequence) -> tuple[SampledLogprobs, ...]:
        """Of the whole prompt but its first token; nothing if they were not asked for."""
        if sequence.prompt_scores is None:
            return ()
        texts, scores = self._vocabulary.token_bytes, sequence.prompt_scores.scores
        sequence.prompt_scores = None
        return tuple(
            SampledLogprobs(
                TokenLogprob(token_id, score.logprob, texts[token_id]),
                tuple(TokenLogprob(i, logprob, texts[i]) for i, logprob in score.top),
            )
            for token_id, score in zip(sequence.prompt.token_ids[1:], scores, strict=True)
        )

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove((sequence,))
        siblings = self._unfinished[sequence.request_key]
        siblings.remove(sequence)
        if not siblings:
            del self._unfinished[sequence.request_key]

    def _shed_newest(self, batch: ScheduledBatch, error: MemoryError) -> list[StepOutput]:
        """Fail the newest request. The others are scheduled again as if nothing had been run."""
        newest = max(batch.scheduled, key=lambda s: s.sequence.arrival).sequence.request_key
        keys = {s.sequence.request_key for s in batch.scheduled}
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
        for key in keys:
            self.abort(key)
        return [StepOutput(key, error=kind(message)) for key in keys]


def _asked_for(stop: str | int, own: Collection[str | int]) -> str | int | None:
    """``stop``, unless it is one of the checkpoint's own, which end every turn."""
    return None if stop in own else stop
