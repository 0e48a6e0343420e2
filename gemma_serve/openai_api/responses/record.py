"""One record of a response, from which both the stream's events and the whole are made."""

import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from gemma_serve.errors import GenerationError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationStarted,
    SamplingParams,
)
from gemma_serve.openai_api.chat_logprobs import VisibleLogprobs
from gemma_serve.openai_api.chat_messages import Message
from gemma_serve.openai_api.responses.input_items import with_calls_joined
from gemma_serve.openai_api.responses.output_items import (
    FunctionCallRecord,
    ItemRecord,
    MessageRecord,
    output_logprob,
)
from gemma_serve.openai_api.responses.request_schemas import (
    JsonSchemaFormat,
    PlainText,
    ResponseRequest,
    TextOptions,
)
from gemma_serve.openai_api.responses.response_schemas import (
    IncompleteDetails,
    InputTokensDetails,
    OutputLogprob,
    Response,
    ResponseError,
    ResponseUsage,
    ToolChoice,
)
from gemma_serve.openai_api.tool_schemas import ChoiceMode
from gemma_serve.tool_calling.events import AnswerEvent, CallStarted, TextPiece
from gemma_serve.tool_calling.parser import ToolCallParser


@dataclass(frozen=True, slots=True)
class ItemOpened:
    """A new item; all before it are complete."""

    output_index: int
    item: ItemRecord


@dataclass(frozen=True, slots=True)
class TextAdded:
    """More of what the model says."""

    output_index: int
    item: MessageRecord
    text: str
    logprobs: list[OutputLogprob]


@dataclass(frozen=True, slots=True)
class ArgumentsAdded:
    """More of a call's arguments."""

    output_index: int
    item: FunctionCallRecord
    text: str


@dataclass(frozen=True, slots=True)
class ItemClosed:
    """Nothing more will come of the item."""

    output_index: int
    item: ItemRecord


ResponseUpdate = ItemOpened | TextAdded | ArgumentsAdded | ItemClosed


class ResponseRecord:
    """Collects one response's deltas. Only the task that answers the request touches it."""

    def __init__(
        self,
        body: ResponseRequest,
        sampling: SamplingParams,
        *,
        started: GenerationStarted,
        parser: ToolCallParser | None = None,
    ) -> None:
        """``sampling``: what the request's open fields came to. ``parser``: finds calls in the
        text; ``None``: there are none to find."""
        self._body = body
        self._sampling = sampling
        self._started = started
        self._parser = parser
        self._created_at = int(time.time())
        self.response_id = f"resp_{uuid.uuid4().hex}"
        self.items: list[ItemRecord] = []
        self._visible_logprobs = VisibleLogprobs()
        self._untold_logprobs: deque[OutputLogprob] = deque()
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._finish_reason: FinishReason | None = None

    def add(self, deltas: Iterable[GenerationDelta]) -> Iterator[ResponseUpdate]:
        """Record one step's deltas, as far as the iterator is read; gives what they bring."""
        for delta in deltas:
            self._num_tokens += len(delta.token_ids)
            self._num_cached_tokens += delta.cached_tokens
            visible = self._visible_logprobs.add(delta)
            self._untold_logprobs += map(output_logprob, visible)
            for event in self._read(delta):
                yield from self._record(event)
            if delta.finish_reason is not None:
                self._finish_reason = delta.finish_reason
                yield from self._finish()

    def require_finished(self) -> None:
        """Raise ``GenerationError`` if the engine stopped before the answer had ended."""
        if self._finish_reason is None:
            raise GenerationError("The model stopped before its answer was complete.")

    def messages(self) -> list[Message]:
        """The answer in the chat that may go on."""
        said = ((index, record.message()) for index, record in enumerate(self.items))
        return [message for _, message in with_calls_joined(said)]

    def started(self) -> Response:
        """The response before there is any output."""
        return self._response("in_progress")

    def whole(self) -> Response:
        """The whole answer. Raises ``GenerationError`` if it is not whole."""
        self.require_finished()
        if self._finish_reason is FinishReason.LENGTH:
            details = IncompleteDetails(reason="max_output_tokens")
            return self._response("incomplete").model_copy(update={"incomplete_details": details})
        return self._response("completed")

    def failed(self, message: str) -> Response:
        """What there is of an answer that will not be whole."""
        if self.items and self.items[-1].status == "in_progress":
            self.items[-1].status = "incomplete"
        error = ResponseError(message=message)
        return self._response("failed").model_copy(update={"error": error})

    def _read(self, delta: GenerationDelta) -> Iterator[AnswerEvent]:
        if self._parser is None:
            if delta.text:
                yield TextPiece(delta.text)
            return
        yield from self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            yield from self._parser.finish()

    def _record(self, event: AnswerEvent) -> Iterator[ResponseUpdate]:
        if isinstance(event, TextPiece):
            yield from self._say(event.text)
            return
        self._untold_logprobs.clear()  # those of a call are told nowhere
        if isinstance(event, CallStarted):
            yield from self._open(FunctionCallRecord(call_id=event.id, name=event.name))
        else:
            call = self.items[-1]
            assert isinstance(call, FunctionCallRecord)  # the parser starts calls before
            call.add(event.text)
            yield ArgumentsAdded(len(self.items) - 1, call, event.text)

    def _say(self, text: str) -> Iterator[ResponseUpdate]:
        if not self.items or not isinstance(self.items[-1], MessageRecord):
            yield from self._open(MessageRecord())
        message = self.items[-1]
        assert isinstance(message, MessageRecord)
        logprobs = self._logprobs_of(text)
        message.add(text, logprobs)
        yield TextAdded(len(self.items) - 1, message, text, logprobs)

    def _logprobs_of(self, text: str) -> list[OutputLogprob]:
        """Those of the tokens that ``text`` is made of, which are the first that are untold."""
        told: list[OutputLogprob] = []
        num_missing_bytes = len(text.encode())
        while self._untold_logprobs and num_missing_bytes > 0:
            told.append(self._untold_logprobs.popleft())
            num_missing_bytes -= len(told[-1].bytes)
        return told

    def _open(self, item: ItemRecord) -> Iterator[ResponseUpdate]:
        yield from self._close("completed")
        self.items.append(item)
        yield ItemOpened(len(self.items) - 1, item)

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[ResponseUpdate]:
        if self.items:
            self.items[-1].status = status
            yield ItemClosed(len(self.items) - 1, self.items[-1])

    def _finish(self) -> Iterator[ResponseUpdate]:
        """An answer without a word is a message too, for clients that look at the first item."""
        if not self.items:
            yield from self._open(MessageRecord())
        is_cut = self._finish_reason is FinishReason.LENGTH
        yield from self._close("incomplete" if is_cut else "completed")

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"]
    ) -> Response:
        body, sampling = self._body, self._sampling
        return Response(
            id=self.response_id,
            created_at=self._created_at,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            instructions=body.instructions,
            model=body.model,
            output=[record.item() for record in self.items],
            previous_response_id=body.previous_response_id,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            max_tool_calls=body.max_tool_calls,
            tools=body.tools or [],
            tool_choice=_tool_choice(body),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            top_logprobs=body.top_logprobs or 0,
            max_output_tokens=body.max_output_tokens,
            text=_text_options(body),
            truncation=body.truncation or "disabled",
            store=body.store is not False,
            metadata=body.metadata or {},
            usage=None if status == "in_progress" else self._usage(),
        )

    def _usage(self) -> ResponseUsage:
        started = self._started
        return ResponseUsage(
            input_tokens=started.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=self._num_cached_tokens),
            output_tokens=self._num_tokens,
            total_tokens=started.prompt_tokens + self._num_tokens,
        )


def _tool_choice(body: ResponseRequest) -> ToolChoice:
    choice = body.tool_choice
    if choice is None:
        return "auto"
    return choice.type if isinstance(choice, ChoiceMode) else choice


def _text_options(body: ResponseRequest) -> TextOptions:
    asked = body.text or TextOptions()
    wanted = asked.format or PlainText()
    if isinstance(wanted, JsonSchemaFormat):
        wanted = wanted.model_copy(update={"strict": True})  # as it is: every schema is enforced
    return asked.model_copy(update={"format": wanted})
