"""One record of an answer, from which both the stream's chunks and the completion are made."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from gemma_serve.errors import GenerationError
from gemma_serve.generation import FinishReason, GenerationDelta, GenerationStarted, Usage
from gemma_serve.openai_api.chat_logprobs import (
    ChoiceLogprobsPayload,
    TokenLogprobPayload,
    VisibleLogprobs,
)
from gemma_serve.openai_api.response_schemas import (
    AssistantAnswer,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
)
from gemma_serve.openai_api.usage import completion_usage


class DeltaPayload(TypedDict, total=False):
    """``ChoiceDelta`` as it is written: a key is there only when it says something."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChoicePayload(TypedDict):
    """``ChunkChoice`` as it is written."""

    index: int
    delta: DeltaPayload
    logprobs: ChoiceLogprobsPayload | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


class ChunkPayload(TypedDict):
    """``ChatCompletionChunk`` as it is written: plain, because one is made for every token."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChoicePayload]
    usage: NotRequired[dict[str, object] | None]
    prompt_token_ids: NotRequired[list[int]]


@dataclass(slots=True)
class _ChoiceRecord:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobPayload] = field(default_factory=list)
    num_sent_logprobs: int = 0
    _visible_logprobs: VisibleLogprobs = field(default_factory=VisibleLogprobs)

    def add(self, delta: GenerationDelta) -> None:
        self.texts.append(delta.text)
        self.logprobs += self._visible_logprobs.add(delta)
        self.token_ids += delta.token_ids
        self.num_cached_tokens += delta.cached_tokens
        self.finish_reason = delta.finish_reason


class ChatCompletionBuilder:
    """Collects one request's deltas. Only the task that answers the request touches it."""

    def __init__(
        self,
        *,
        completion_id: str,
        created: int,
        model: str,
        n: int,
        started: GenerationStarted,
        stream_usage: bool = False,
        logprobs: bool = False,
        return_token_ids: bool = False,
    ) -> None:
        """``created``: Unix time in seconds. ``stream_usage``, ``logprobs``, ``return_token_ids``:
        the client asked to be told."""
        self.completion_id = completion_id
        self._created = created
        self._model = model
        self._started = started
        self._stream_usage = stream_usage
        self._reports_logprobs = logprobs
        self._return_token_ids = return_token_ids
        self._choices = [_ChoiceRecord() for _ in range(n)]

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """One per choice; ``None`` while it goes on."""
        return [choice.finish_reason for choice in self._choices]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self._started.prompt_tokens,
            completion_tokens=sum(len(choice.token_ids) for choice in self._choices),
            cached_tokens=self._choices[0].num_cached_tokens,
        )

    def add(self, deltas: Iterable[GenerationDelta]) -> Sequence[GenerationDelta]:
        """Record one step's deltas; gives them back with each choice's own merged."""
        merged: dict[int, GenerationDelta] = {}
        for delta in deltas:
            earlier = merged.get(delta.index)
            merged[delta.index] = delta if earlier is None else earlier + delta
        for delta in merged.values():
            self._choices[delta.index].add(delta)
        return tuple(merged.values())

    def require_finished(self) -> None:
        """Raise ``GenerationError`` if the engine stopped before every choice had ended."""
        if None in self.finish_reasons:
            raise GenerationError("The model stopped before its answer was complete.")

    def completion(self) -> ChatCompletion:
        """The whole answer. Raises ``GenerationError`` if it is not whole."""
        self.require_finished()
        return ChatCompletion(
            id=self.completion_id,
            created=self._created,
            model=self._model,
            choices=[
                Choice(
                    index=index,
                    message=AssistantAnswer(content="".join(choice.texts)),
                    logprobs=ChoiceLogprobs.model_validate(_logprobs(choice.logprobs))
                    if self._reports_logprobs
                    else None,
                    finish_reason=choice.finish_reason,
                    token_ids=choice.token_ids if self._return_token_ids else None,
                )
                for index, choice in enumerate(self._choices)
                if choice.finish_reason is not None
            ],
            usage=completion_usage(self.usage),
            prompt_token_ids=self._prompt_token_ids() if self._return_token_ids else None,
        )

    def opening_chunks(self) -> Iterator[ChunkPayload]:
        """The chunks that open a stream, before there is any text."""
        for index in range(len(self._choices)):
            chunk = self._choice_chunk(index, {"role": "assistant", "content": "", "refusal": None})
            if index == 0 and self._return_token_ids:
                chunk["prompt_token_ids"] = self._prompt_token_ids()
            yield chunk

    def delta_chunks(self, deltas: Iterable[GenerationDelta]) -> Iterator[ChunkPayload]:
        """Record one step's deltas; gives the chunks of what is new."""
        for delta in self.add(deltas):
            if delta.text or (self._return_token_ids and delta.token_ids):
                chunk = self._choice_chunk(delta.index, {"content": delta.text})
                chunk["choices"][0]["logprobs"] = self._unsent_logprobs(delta.index)
                if self._return_token_ids:
                    chunk["choices"][0]["token_ids"] = list(delta.token_ids)
                yield chunk
            if delta.finish_reason is not None:
                yield self._choice_chunk(delta.index, {}, delta.finish_reason)

    def usage_chunks(self) -> Iterator[ChunkPayload]:
        """The chunk that closes a stream, if the client asked for it."""
        if self._stream_usage:
            chunk = self._chunk([])
            chunk["usage"] = completion_usage(self.usage).model_dump()
            yield chunk

    def _unsent_logprobs(self, index: int) -> ChoiceLogprobsPayload | None:
        if not self._reports_logprobs:
            return None
        choice = self._choices[index]
        unsent = choice.logprobs[choice.num_sent_logprobs :]
        choice.num_sent_logprobs = len(choice.logprobs)
        return _logprobs(unsent)

    def _prompt_token_ids(self) -> list[int]:
        return [token.token_id for token in self._started.prompt]

    def _choice_chunk(
        self, index: int, delta: DeltaPayload, finish_reason: FinishReason | None = None
    ) -> ChunkPayload:
        return self._chunk(
            [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        )

    def _chunk(self, choices: list[ChoicePayload]) -> ChunkPayload:
        chunk: ChunkPayload = {
            "id": self.completion_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        if self._stream_usage:
            chunk["usage"] = None
        return chunk


def _logprobs(content: list[TokenLogprobPayload]) -> ChoiceLogprobsPayload:
    return {"content": content, "refusal": None}
