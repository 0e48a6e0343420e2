"""The step: schedule, run, take the tokens in, hand out text."""

import logging
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import count

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.engine.model_runner import ModelRunner
from gemma_serve.engine.prompt_scores import PromptScores
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, Scheduler
from gemma_serve.engine.sequence import PromptInputs, Sequence
from gemma_serve.engine.stats import EngineStats
from gemma_serve.errors import GemmaServeError, GenerationError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    SampledLogprobs,
    SamplingParams,
    TokenLogprob,
)

logger = logging.getLogger(__name__)


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
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._block_manager = block_manager
        self.vocabulary = vocabulary
        self._max_model_len = max_model_len
        self._unfinished: dict[int, list[Sequence]] = {}
        self._arrivals = count()
        self._num_failed_steps_in_a_row = 0

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
        )

    def add(self, request: EngineRequest) -> list[StepOutput]:
        """Queue a request whose prompt is shorter than ``max_model_len``.

        Returns the failure of one that cannot even begin, else nothing.
        """
        try:
            sequences = [self._new_sequence(request, index) for index in range(request.n)]
        except Exception:
            # The boundary of one request: the engine must outlive it.
            logger.exception("a request could not begin")
            return [StepOutput(request.key, error=_failure())]
        self._unfinished[request.key] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)
        return []

    def abort(self, key: int) -> None:
        """Drop a request and free its blocks; nothing happens if it has ended already."""
        self._scheduler.remove(self._unfinished.pop(key, []))

    def step(self) -> list[StepOutput]:
        """Compute one step. A failure ends the requests of that step and no others."""
        batch = self._scheduler.schedule()
        if batch is None:
            return []
        try:
            token_ids = self._runner.run(batch)
            self._scheduler.mark_computed(batch)
            outputs = self._take_in(batch, token_ids)
        except Exception:
            # The boundary between one step and the next: the engine must outlive any request.
            logger.exception("a step of %d sequences failed", len(batch.scheduled))
            self._num_failed_steps_in_a_row += 1
            return self._fail({s.sequence.request_key for s in batch.scheduled})
        self._num_failed_steps_in_a_row = 0
        return outputs

    def _new_sequence(self, request: EngineRequest, index: int) -> Sequence:
        sampling, prompt = request.sampling, request.prompt
        num_prompt_tokens = len(prompt.token_ids)
        max_tokens = self._max_model_len if (m := sampling.max_tokens) is None else m
        vocabulary = self.vocabulary
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
            block_table=self._block_manager.new_table(),
            arrival=next(self._arrivals),
            token_ids=list(prompt.token_ids),
            prompt_scores=PromptScores(
                num_prompt_tokens=num_prompt_tokens, num_top=sampling.prompt_logprobs
            )
            if sampling.prompt_logprobs is not None and index == 0
            else None,
        )

    def _take_in(self, batch: ScheduledBatch, token_ids: Seq[int]) -> list[StepOutput]:
        deltas: dict[int, list[GenerationDelta]] = {}
        for scheduled, token_id in zip(batch.sampling, token_ids, strict=True):
            sequence = scheduled.sequence
            delta = self._with_prompt_logprobs(sequence, self._advance(sequence, token_id))
            deltas.setdefault(sequence.request_key, []).append(delta)
            if delta.finish_reason is not None:
                self._finish(sequence)
        return [StepOutput(key, tuple(of_request)) for key, of_request in deltas.items()]

    def _advance(self, sequence: Sequence, token_id: int) -> GenerationDelta:
        """Append a sampled token and say what became final by it."""
        if len(sequence.token_ids) >= sequence.max_total_tokens:  # only the prompt was asked for
            return GenerationDelta(sequence.index, "", (), FinishReason.LENGTH)
        sequence.token_ids.append(token_id)
        sequence.sampling_state.append(token_id)
        finish_reason = None
        if token_id in sequence.stop_token_ids:
            text, finish_reason = sequence.detokenizer.flush(), FinishReason.STOP
        else:
            text = sequence.detokenizer.append((token_id,))
            if sequence.detokenizer.matched_stop is not None:
                finish_reason = FinishReason.STOP
            elif len(sequence.token_ids) >= sequence.max_total_tokens:
                text, finish_reason = text + sequence.detokenizer.flush(), FinishReason.LENGTH
        return GenerationDelta(sequence.index, text, (token_id,), finish_reason)

    def _with_prompt_logprobs(self, sequence: Sequence, delta: GenerationDelta) -> GenerationDelta:
        """``delta``, with the prompt's logprobs if it is the first and they were asked for."""
        if sequence.prompt_scores is None:
            return delta
        texts, scores = self.vocabulary.token_bytes, sequence.prompt_scores.scores
        sequence.prompt_scores = None
        return replace(
            delta,
            prompt_logprobs=tuple(
                SampledLogprobs(
                    TokenLogprob(token_id, score.logprob, texts[token_id]),
                    tuple(TokenLogprob(i, logprob, texts[i]) for i, logprob in score.top),
                )
                for token_id, score in zip(sequence.prompt.token_ids[1:], scores, strict=True)
            ),
        )

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove((sequence,))
        siblings = self._unfinished[sequence.request_key]
        siblings.remove(sequence)
        if not siblings:
            del self._unfinished[sequence.request_key]

    def _fail(self, keys: Collection[int]) -> list[StepOutput]:
        for key in keys:
            self.abort(key)
        return [StepOutput(key, error=_failure()) for key in keys]


def _failure() -> GenerationError:
    return GenerationError("The model failed while it worked on this request. Please try again.")
