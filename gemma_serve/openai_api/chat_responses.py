"""One record of an answer, from which both the stream's chunks and the completion are made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from gemma_serve.errors import GenerationError
from gemma_serve.generation import FinishReason, GenerationDelta, GenerationStarted, Usage
from gemma_serve.openai_api.response_schemas import (
    AnsweredToolCall,
    AssistantAnswer,
    CalledFunction,
    ChatCompletion,
    Choice,
    ChoiceFinishReason,
    CompletionTokensDetails,
    CompletionUsage,
    PromptTokensDetails,
    ToolCallingAnswer,
)
from gemma_serve.tool_calling.events import AnswerEvent, ArgumentsPiece, CallStarted, TextPiece
from gemma_serve.tool_calling.parser import ToolCallParser


class FunctionPayload(TypedDict):
    """``FunctionDelta`` as it is written."""

    name: NotRequired[str]
    arguments: str


class ToolCallPayload(TypedDict):
    """``ToolCallDelta`` as it is written."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPayload


class DeltaPayload(TypedDict, total=False):
    """``ChoiceDelta`` as it is written: a key is there only when it says something."""

    role: Literal["assistant"]
    content: str
    refusal: None
    tool_calls: list[ToolCallPayload]


class ChoicePayload(TypedDict):
    """``ChunkChoice`` as it is written."""

    index: int
    delta: DeltaPayload
    logprobs: None
    finish_reason: ChoiceFinishReason | None


class ChunkPayload(TypedDict):
    """``ChatCompletionChunk`` as it is written: plain, because one is made for every token."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChoicePayload]
    usage: NotRequired[dict[str, object] | None]


@dataclass(frozen=True, slots=True)
class ChoiceUpdate:
    """What one step of the engine brought of one choice."""

    index: int
    events: Sequence[AnswerEvent]
    finish_reason: ChoiceFinishReason | None


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _ChoiceRecord:
    parser: ToolCallParser | None
    texts: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: ChoiceFinishReason | None = None

    def add(self, delta: GenerationDelta) -> ChoiceUpdate:
        events = self._read(delta)
        for event in events:
            if isinstance(event, TextPiece):
                self.texts.append(event.text)
            elif isinstance(event, CallStarted):
                self.calls.append(_Call(event.id, event.name))
            else:
                self.calls[event.index].arguments.append(event.text)
        self.num_tokens += len(delta.token_ids)
        self.finish_reason = self._finish_reason(delta)
        return ChoiceUpdate(delta.index, events, self.finish_reason)

    def message(self) -> AssistantAnswer | ToolCallingAnswer:
        text = "".join(self.texts)
        if not self.calls:
            return AssistantAnswer(content=text)
        calls = [
            AnsweredToolCall(
                id=call.id,
                function=CalledFunction(name=call.name, arguments="".join(call.arguments)),
            )
            for call in self.calls
        ]
        return ToolCallingAnswer(content=text or None, tool_calls=calls)

    def _read(self, delta: GenerationDelta) -> Sequence[AnswerEvent]:
        if self.parser is None:
            return (TextPiece(delta.text),) if delta.text else ()
        events = self.parser.feed(delta.text)
        return events if delta.finish_reason is None else (*events, *self.parser.finish())

    def _finish_reason(self, delta: GenerationDelta) -> ChoiceFinishReason | None:
        if delta.finish_reason is None:
            return None
        if delta.finish_reason is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if self.calls else "stop"


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
        make_parser: Callable[[], ToolCallParser] | None = None,
    ) -> None:
        """``created``: Unix time in seconds. ``stream_usage``: the client asked to be told.

        ``make_parser``: finds calls in one choice's text; ``None``: there are none to find.
        """
        self.completion_id = completion_id
        self._created = created
        self._model = model
        self._started = started
        self._stream_usage = stream_usage
        self._choices = [_ChoiceRecord(make_parser() if make_parser else None) for _ in range(n)]

    @property
    def finish_reasons(self) -> list[ChoiceFinishReason | None]:
        """One per choice; ``None`` while it goes on."""
        return [choice.finish_reason for choice in self._choices]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self._started.prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=self._started.cached_tokens,
        )

    def add(self, deltas: Iterable[GenerationDelta]) -> Sequence[ChoiceUpdate]:
        """Record one step's deltas; gives back what each choice's own, merged, turned out to be."""
        merged: dict[int, GenerationDelta] = {}
        for delta in deltas:
            earlier = merged.get(delta.index)
            merged[delta.index] = delta if earlier is None else earlier + delta
        return tuple(self._choices[delta.index].add(delta) for delta in merged.values())

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
                    message=choice.message(),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(self._choices)
                if choice.finish_reason is not None
            ],
            usage=_completion_usage(self.usage),
        )

    def role_chunks(self) -> Iterator[ChunkPayload]:
        """The chunks that open a stream, before there is any text."""
        for index in range(len(self._choices)):
            yield self._choice_chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def delta_chunks(self, updates: Iterable[ChoiceUpdate]) -> Iterator[ChunkPayload]:
        """The chunks of what ``add`` gave back."""
        for update in updates:
            for event in update.events:
                yield self._choice_chunk(update.index, _delta(event))
            if update.finish_reason is not None:
                yield self._choice_chunk(update.index, {}, update.finish_reason)

    def usage_chunks(self) -> Iterator[ChunkPayload]:
        """The chunk that closes a stream, if the client asked for it."""
        if self._stream_usage:
            chunk = self._chunk([])
            chunk["usage"] = _completion_usage(self.usage).model_dump()
            yield chunk

    def _choice_chunk(
        self, index: int, delta: DeltaPayload, finish_reason: ChoiceFinishReason | None = None
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


def _delta(event: AnswerEvent) -> DeltaPayload:
    if isinstance(event, TextPiece):
        return {"content": event.text}
    if isinstance(event, ArgumentsPiece):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    call: ToolCallPayload = {
        "index": event.index,
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }
    return {"tool_calls": [call]}


def _completion_usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(),
    )
