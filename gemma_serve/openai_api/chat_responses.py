"""One record of an answer, from which both the stream's chunks and the completion are made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NotRequired, TypedDict

from pydantic import TypeAdapter

from gemma_serve.errors import GenerationError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationStarted,
    SampledLogprobs,
    Usage,
)
from gemma_serve.openai_api.chat_logprobs import (
    ChoiceLogprobsPayload,
    TokenLogprobPayload,
    VisibleLogprobs,
)
from gemma_serve.openai_api.prompt_logprobs import prompt_logprobs
from gemma_serve.openai_api.response_schemas import (
    AnsweredToolCall,
    AssistantAnswer,
    CalledFunction,
    ChatCompletion,
    Choice,
    ChoiceFinishReason,
    ChoiceLogprobs,
    PromptLogprobs,
    ToolCallingAnswer,
)
from gemma_serve.openai_api.sampling_fields import StreamUsage
from gemma_serve.openai_api.usage import completion_usage
from gemma_serve.tool_calling.events import AnswerEvent, ArgumentsPiece, CallStarted, TextPiece
from gemma_serve.tool_calling.parser import ToolCallParser

_PROMPT_LOGPROBS: Final = TypeAdapter(PromptLogprobs)


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
    content: str | None
    refusal: None
    tool_calls: list[ToolCallPayload]


class ChoicePayload(TypedDict):
    """``ChunkChoice`` as it is written."""

    index: int
    delta: DeltaPayload
    logprobs: ChoiceLogprobsPayload | None
    finish_reason: ChoiceFinishReason | None
    stop_reason: NotRequired[str | int]
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


@dataclass(frozen=True, slots=True)
class ChoiceUpdate:
    """What one step of the engine brought of one choice."""

    index: int
    events: Sequence[AnswerEvent]
    finish_reason: ChoiceFinishReason | None

    @property
    def starts_with_call(self) -> bool:
        """Whether the first that is new is a call."""
        return bool(self.events) and isinstance(self.events[0], CallStarted)


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _ChoiceRecord:
    parser: ToolCallParser | None
    visible_logprobs: VisibleLogprobs
    texts: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: ChoiceFinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobPayload] = field(default_factory=list)
    has_sent_role: bool = False
    num_sent_logprobs: int = 0
    num_sent_token_ids: int = 0

    def add(self, delta: GenerationDelta) -> ChoiceUpdate:
        events = self._read(delta)
        for event in events:
            if isinstance(event, TextPiece):
                self.texts.append(event.text)
            elif isinstance(event, CallStarted):
                self.calls.append(_Call(event.id, event.name))
            else:
                self.calls[event.index].arguments.append(event.text)
        self.logprobs += self.visible_logprobs.add(delta)
        self.token_ids += delta.token_ids
        self.num_cached_tokens += delta.cached_tokens
        self.finish_reason = self._finish_reason(delta)
        self.stop_reason = delta.stop_reason
        return ChoiceUpdate(delta.index, events, self.finish_reason)

    @property
    def has_unsent_logprobs(self) -> bool:
        return self.num_sent_logprobs < len(self.logprobs)

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
        stream_usage: StreamUsage = "none",
        make_parser: Callable[[], ToolCallParser] | None = None,
        logprobs: bool = False,
        tokens_as_token_ids: bool = False,
        return_token_ids: bool = False,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        """``created``: Unix time in seconds. ``logprobs``, ``return_token_ids``: the client asked
        to be told. ``tokens_as_token_ids``: how ``logprobs`` write tokens.

        ``num_prompt_logprobs``: of the most probable tokens in each place of the prompt; ``None``:
        it is not asked about.
        ``make_parser``: finds calls in one choice's text; ``None``: there are none to find.
        """
        self.completion_id = completion_id
        self._created = created
        self._model = model
        self._started = started
        self._stream_usage = stream_usage
        self._reports_logprobs = logprobs
        self._return_token_ids = return_token_ids
        self._num_prompt_logprobs = num_prompt_logprobs
        self._prompt_positions: list[SampledLogprobs] = []
        self._choices = [
            _ChoiceRecord(
                make_parser() if make_parser else None,
                VisibleLogprobs(as_token_ids=tokens_as_token_ids),
            )
            for _ in range(n)
        ]

    @property
    def finish_reasons(self) -> list[ChoiceFinishReason | None]:
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

    def add(self, deltas: Iterable[GenerationDelta]) -> Sequence[ChoiceUpdate]:
        """Record one step's deltas; gives back what each choice's own, merged, turned out to be."""
        merged: dict[int, GenerationDelta] = {}
        for delta in deltas:
            self._prompt_positions += delta.prompt_logprobs
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
                    logprobs=ChoiceLogprobs.model_validate(_logprobs(choice.logprobs))
                    if self._reports_logprobs
                    else None,
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    token_ids=choice.token_ids if self._return_token_ids else None,
                )
                for index, choice in enumerate(self._choices)
                if choice.finish_reason is not None
            ],
            usage=completion_usage(self.usage),
            prompt_token_ids=self._prompt_token_ids() if self._return_token_ids else None,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def opening_chunks(self) -> Iterator[ChunkPayload]:
        """The chunks that open a stream, before there is any text.

        Choices that may be calls open later: the role of a call comes with no content, as from
        OpenAI, and clients take an empty one for the start of a text.
        """
        for index, choice in enumerate(self._choices):
            if choice.parser is None:
                yield self._role_chunk(index, "")

    def delta_chunks(self, deltas: Iterable[GenerationDelta]) -> Iterator[ChunkPayload]:
        """Record one step's deltas; gives the chunks of what is new."""
        for update in self.add(deltas):
            is_new = bool(update.events) or update.finish_reason is not None
            if is_new and not self._choices[update.index].has_sent_role:
                yield self._role_chunk(update.index, None if update.starts_with_call else "")
            for event in update.events:
                yield self._piece_chunk(update.index, _delta(event))
            if update.finish_reason is not None:
                yield self._finish_chunk(update.index, update.finish_reason)

    def usage_chunks(self) -> Iterator[ChunkPayload]:
        """The chunk that closes a stream, if the client asked for it."""
        if self._stream_usage != "none":
            chunk = self._chunk([])
            chunk["usage"] = self._usage_payload()
            yield chunk

    def _role_chunk(self, index: int, content: str | None) -> ChunkPayload:
        self._choices[index].has_sent_role = True
        delta: DeltaPayload = {"role": "assistant", "content": content, "refusal": None}
        chunk = self._choice_chunk(index, delta)
        if index == 0 and self._return_token_ids:
            chunk["prompt_token_ids"] = self._prompt_token_ids()
        return chunk

    def _piece_chunk(self, index: int, delta: DeltaPayload) -> ChunkPayload:
        """A piece of text or of a call. It tells of all tokens that are untold."""
        chunk = self._choice_chunk(index, delta)
        chunk["choices"][0]["logprobs"] = self._unsent_logprobs(index)
        self._tell_token_ids(chunk)
        return chunk

    def _finish_chunk(self, index: int, finish_reason: ChoiceFinishReason) -> ChunkPayload:
        choice, chunk = self._choices[index], self._choice_chunk(index, {}, finish_reason)
        if choice.has_unsent_logprobs:  # of what a call ends with
            chunk["choices"][0]["logprobs"] = self._unsent_logprobs(index)
        if choice.stop_reason is not None:
            chunk["choices"][0]["stop_reason"] = choice.stop_reason
        self._tell_token_ids(chunk)
        return chunk

    def _tell_token_ids(self, chunk: ChunkPayload) -> None:
        if not self._return_token_ids:
            return
        (payload,) = chunk["choices"]
        choice = self._choices[payload["index"]]
        payload["token_ids"] = choice.token_ids[choice.num_sent_token_ids :]
        choice.num_sent_token_ids = len(choice.token_ids)

    def _unsent_logprobs(self, index: int) -> ChoiceLogprobsPayload | None:
        if not self._reports_logprobs:
            return None
        choice = self._choices[index]
        unsent = choice.logprobs[choice.num_sent_logprobs :]
        choice.num_sent_logprobs = len(choice.logprobs)
        return _logprobs(unsent)

    def _prompt_token_ids(self) -> list[int]:
        return [token.token_id for token in self._started.prompt]

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        if self._num_prompt_logprobs is None:
            return None
        payload = prompt_logprobs(self._prompt_positions, self._num_prompt_logprobs)
        return _PROMPT_LOGPROBS.validate_python(payload)

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
        match self._stream_usage:
            case "last":
                chunk["usage"] = None
            case "every":
                chunk["usage"] = self._usage_payload()
        return chunk

    def _usage_payload(self) -> dict[str, object]:
        return completion_usage(self.usage).model_dump()


def _logprobs(content: list[TokenLogprobPayload]) -> ChoiceLogprobsPayload:
    return {"content": content, "refusal": None}


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
