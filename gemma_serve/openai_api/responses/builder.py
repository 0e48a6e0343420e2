"""One record of a response, from which both the stream's events and the whole are made."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Literal

from gemma_serve.errors import GenerationError
from gemma_serve.generation import FinishReason, GenerationDelta, GenerationStarted, SamplingParams
from gemma_serve.openai_api.responses.request_schemas import (
    JsonSchemaFormat,
    PlainText,
    ResponseRequest,
    TextOptions,
)
from gemma_serve.openai_api.responses.response_schemas import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    Response,
    ResponseError,
    ResponseUsage,
)

Event = dict[str, object]
"""``ResponseEvent`` as it is written: plain, because one is made for every token."""


class ResponseBuilder:
    """Collects one response's deltas. Only the task that answers the request touches it."""

    def __init__(
        self, body: ResponseRequest, sampling: SamplingParams, *, started: GenerationStarted
    ) -> None:
        """``sampling``: what the request's open fields came to."""
        self._body = body
        self._sampling = sampling
        self._started = started
        self._created_at = int(time.time())
        self._response_id = f"resp_{uuid.uuid4().hex}"
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._texts: list[str] = []
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._num_events = 0

    @property
    def text(self) -> str:
        """What the model has said so far."""
        return "".join(self._texts)

    def add(self, deltas: Iterable[GenerationDelta]) -> str:
        """Record one step's deltas; gives the text that they add."""
        added = []
        for delta in deltas:
            added.append(delta.text)
            self._num_tokens += len(delta.token_ids)
            self._num_cached_tokens += delta.cached_tokens
            self._finish_reason = delta.finish_reason
        self._texts += added
        return "".join(added)

    def require_finished(self) -> None:
        """Raise ``GenerationError`` if the engine stopped before the answer had ended."""
        if self._finish_reason is None:
            raise GenerationError("The model stopped before its answer was complete.")

    def response(self) -> Response:
        """The whole answer. Raises ``GenerationError`` if it is not whole."""
        self.require_finished()
        if self._finish_reason is FinishReason.LENGTH:
            ended = self._response("incomplete", [self._message("incomplete")])
            details = IncompleteDetails(reason="max_output_tokens")
            return ended.model_copy(update={"incomplete_details": details})
        return self._response("completed", [self._message("completed")])

    def opening_events(self) -> Iterator[Event]:
        """What opens a stream, before there is any text."""
        started = self._response("in_progress", []).model_dump(mode="json")
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        item = self._message("in_progress").model_copy(update={"content": []})
        yield self._event("response.output_item.added", output_index=0, item=item.model_dump())
        part = OutputText(text="").model_dump()
        yield self._content_event("response.content_part.added", part=part)

    def delta_events(self, deltas: Iterable[GenerationDelta]) -> Iterator[Event]:
        """Record one step's deltas; gives the event of what is new."""
        if text := self.add(deltas):
            yield self._content_event("response.output_text.delta", delta=text, logprobs=[])

    def closing_events(self, response: Response) -> Iterator[Event]:
        """What closes a stream. ``response``: the whole answer."""
        text, (item,) = self.text, response.output
        yield self._content_event("response.output_text.done", text=text, logprobs=[])
        part = OutputText(text=text).model_dump()
        yield self._content_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item.model_dump())
        whole = response.model_dump(mode="json")
        yield self._event(f"response.{response.status}", response=whole)

    def failure_events(self, message: str) -> Iterator[Event]:
        """What closes the stream of a response that failed."""
        yield self._event("error", code="server_error", message=message, param=None)
        failed = self._response("failed", [self._message("incomplete")])
        failed = failed.model_copy(update={"error": ResponseError(message=message)})
        yield self._event("response.failed", response=failed.model_dump(mode="json"))

    def _content_event(self, kind: str, **fields: object) -> Event:
        return self._event(
            kind, item_id=self._message_id, output_index=0, content_index=0, **fields
        )

    def _event(self, kind: str, **fields: object) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _message(self, status: Literal["in_progress", "completed", "incomplete"]) -> OutputMessage:
        return OutputMessage(
            id=self._message_id, status=status, content=[OutputText(text=self.text)]
        )

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        output: list[OutputMessage],
    ) -> Response:
        body, sampling = self._body, self._sampling
        return Response(
            id=self._response_id,
            created_at=self._created_at,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            instructions=body.instructions,
            model=body.model,
            output=output,
            previous_response_id=body.previous_response_id,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            tools=body.tools or [],
            tool_choice=body.tool_choice or "auto",
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            max_output_tokens=body.max_output_tokens,
            text=_text_options(body),
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


def _text_options(body: ResponseRequest) -> TextOptions:
    asked = body.text or TextOptions()
    wanted = asked.format or PlainText()
    if isinstance(wanted, JsonSchemaFormat):
        wanted = wanted.model_copy(update={"strict": True})  # as it is: every schema is enforced
    return asked.model_copy(update={"format": wanted})
