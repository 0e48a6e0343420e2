"""What a sampled token means for its sequence: its text, and whether it ends it."""

from collections.abc import Collection
from dataclasses import replace

from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.sequence import Sequence
from gemma_serve.engine.vocabulary import Vocabulary
from gemma_serve.generation import FinishReason, GenerationDelta, SampledLogprobs


def take_in(
    sequence: Sequence, sampled: SampledToken, vocabulary: Vocabulary
) -> GenerationDelta | None:
    """Append the next token of a sequence and say what became final by it; ``None``: no token was
    possible."""
    is_first = len(sequence.token_ids) == len(sequence.prompt.token_ids)
    if len(sequence.token_ids) >= sequence.max_total_tokens:  # only the prompt was asked for
        delta = GenerationDelta(sequence.index, "", (), FinishReason.LENGTH)
    elif sampled.token_id is None:
        return None
    else:
        delta = _advance(sequence, sampled.token_id, sampled, vocabulary)
    if not is_first:
        return delta
    return replace(
        delta,
        cached_tokens=sequence.num_cached_tokens,
        prompt_logprobs=_take_prompt_logprobs(sequence, vocabulary),
    )


def _advance(
    sequence: Sequence, token_id: int, sampled: SampledToken, vocabulary: Vocabulary
) -> GenerationDelta:
    sequence.token_ids.append(token_id)
    sequence.sampling_state.append(token_id)
    finish_reason, stop_reason = None, None
    if token_id in sequence.stop_token_ids:
        text, finish_reason = sequence.detokenizer.flush(), FinishReason.STOP
        stop_reason = _asked_for(token_id, vocabulary.eos_token_ids)
    else:
        text = sequence.detokenizer.append((token_id,))
        if (matched := sequence.detokenizer.matched_stop) is not None:
            finish_reason = FinishReason.STOP
            stop_reason = _asked_for(matched, vocabulary.stop_strings)
        elif sequence.sampling_state.is_over:
            text, finish_reason = text + sequence.detokenizer.flush(), FinishReason.STOP
        elif len(sequence.token_ids) >= sequence.max_total_tokens:
            text, finish_reason = text + sequence.detokenizer.flush(), FinishReason.LENGTH
    return GenerationDelta(
        sequence.index,
        text,
        (token_id,),
        finish_reason,
        stop_reason,
        logprobs=_logprobs(sampled, vocabulary),
    )


def _logprobs(sampled: SampledToken, vocabulary: Vocabulary) -> tuple[SampledLogprobs, ...]:
    """Of one token; nothing if they were not asked for."""
    if not sampled.logprobs:
        return ()
    chosen, *top = sampled.logprobs
    return (vocabulary.spelled_out(chosen, top),)


def _take_prompt_logprobs(
    sequence: Sequence, vocabulary: Vocabulary
) -> tuple[SampledLogprobs, ...]:
    """Of the whole prompt but its first token; nothing if they were not asked for."""
    if sequence.prompt_scores is None:
        return ()
    scores = sequence.prompt_scores.scores
    sequence.prompt_scores = None
    return tuple(
        vocabulary.spelled_out((token_id, score.logprob), score.top)
        for token_id, score in zip(sequence.prompt.token_ids[1:], scores, strict=True)
    )


def _asked_for(stop: str | int, own: Collection[str | int]) -> str | int | None:
    """``stop``, unless it is one of the checkpoint's own, which end every turn."""
    return None if stop in own else stop
