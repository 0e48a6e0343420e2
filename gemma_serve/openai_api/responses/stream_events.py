"""The events of a streamed response, in their order and numbered."""

from collections.abc import Iterator

from gemma_serve.openai_api.responses.output_items import MessageRecord
from gemma_serve.openai_api.responses.record import (
    ArgumentsAdded,
    ItemClosed,
    ItemOpened,
    ResponseUpdate,
    TextAdded,
)
from gemma_serve.openai_api.responses.response_schemas import OutputLogprob, OutputText, Response

Event = dict[str, object]
"""``ResponseEvent`` as it is written: plain, because one is made for every token."""


class EventWriter:
    """Writes one response's events."""

    def __init__(self) -> None:
        self._num_events = 0

    def opening(self, response: Response) -> Iterator[Event]:
        """What opens a stream, before there is any output."""
        started = response.model_dump(mode="json")
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)

    def update(self, update: ResponseUpdate) -> Iterator[Event]:
        """What became of the output."""
        match update:
            case TextAdded(output_index, message, text, logprobs):
                yield self._content_event(
                    "response.output_text.delta",
                    message,
                    output_index,
                    delta=text,
                    logprobs=_dumped(logprobs),
                )
            case ArgumentsAdded(output_index, call, text):
                yield self._event(
                    "response.function_call_arguments.delta",
                    item_id=call.id,
                    output_index=output_index,
                    delta=text,
                )
            case ItemOpened():
                yield from self._opened(update)
            case ItemClosed():
                yield from self._closed(update)

    def closing(self, response: Response) -> Iterator[Event]:
        """What closes a stream. ``response``: the whole answer."""
        whole = response.model_dump(mode="json")
        yield self._event(f"response.{response.status}", response=whole)

    def failure(self, response: Response) -> Iterator[Event]:
        """What closes the stream of a response that failed."""
        assert response.error is not None
        message = response.error.message
        yield self._event("error", code="server_error", message=message, param=None)
        yield self._event("response.failed", response=response.model_dump(mode="json"))

    def _opened(self, opened: ItemOpened) -> Iterator[Event]:
        index, record = opened.output_index, opened.item
        item = record.opening().model_dump()
        yield self._event("response.output_item.added", output_index=index, item=item)
        if isinstance(record, MessageRecord):
            part = OutputText(text="").model_dump()
            yield self._content_event("response.content_part.added", record, index, part=part)

    def _closed(self, closed: ItemClosed) -> Iterator[Event]:
        index, record = closed.output_index, closed.item
        if isinstance(record, MessageRecord):
            content = record.content()
            yield self._content_event(
                "response.output_text.done",
                record,
                index,
                text=content.text,
                logprobs=_dumped(content.logprobs),
            )
            part = content.model_dump()
            yield self._content_event("response.content_part.done", record, index, part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done",
                item_id=record.id,
                output_index=index,
                name=record.name,
                arguments=record.arguments,
            )
        item = record.item().model_dump()
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _content_event(
        self, kind: str, message: MessageRecord, output_index: int, **fields: object
    ) -> Event:
        return self._event(
            kind, item_id=message.id, output_index=output_index, content_index=0, **fields
        )

    def _event(self, kind: str, **fields: object) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event


def _dumped(logprobs: list[OutputLogprob]) -> list[dict[str, object]]:
    return [of_token.model_dump() for of_token in logprobs]
