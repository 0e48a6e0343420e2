"""Responses: made, streamed, stored, continued, deleted."""

import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from starlette.responses import Response as HTTPResponse

from gemma_serve.errors import InvalidRequestError, NotFoundError
from gemma_serve.generation import GenerationStream
from gemma_serve.openai_api.chat_admission import AdmittedChat, ChatAdmission
from gemma_serve.openai_api.chat_messages import Message
from gemma_serve.openai_api.disconnects import finish_despite_cancellation
from gemma_serve.openai_api.error_responses import error_body, log_failure
from gemma_serve.openai_api.responses.chat_translation import ResponseChat, translate
from gemma_serve.openai_api.responses.record import ResponseRecord
from gemma_serve.openai_api.responses.request_schemas import ResponseRequest
from gemma_serve.openai_api.responses.response_schemas import (
    DeletedResponse,
    InputTokens,
    Response,
)
from gemma_serve.openai_api.responses.store import ResponseStore, StoredResponse
from gemma_serve.openai_api.responses.stored_items import (
    InputItemList,
    StoredItem,
    page_of,
    stored_items,
)
from gemma_serve.openai_api.responses.stream_events import Event, EventWriter
from gemma_serve.openai_api.served_model import check_model
from gemma_serve.openai_api.sse import EventStreamResponse, encode_named_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Responses:
    """Answers response requests with the help of a model."""

    admission: ChatAdmission
    store: ResponseStore

    async def create(
        self, body: ResponseRequest, *, request_id: str, api_key_id: str | None = None
    ) -> HTTPResponse:
        """Admit the request and answer it; ``request_id`` is what logs call it.

        ``api_key_id``: as ``Requester.of`` takes it.
        Raises whatever keeps the request from being admitted, so that it becomes a real status.
        """
        check_model(body.model, self.admission.config)
        chat = translate(body, self._history(body), self.store.message)
        place = None if body.store is False else _Place(self.store, tuple(stored_items(body.input)))
        with chat.own_names():
            admitted = await self.admission.admit(
                chat.request,
                request_id=request_id,
                api_key_id=api_key_id,
                truncation=body.truncation or "disabled",
            )
        answer = _Answer(request_id, admitted.stream, _record(body, admitted), chat, place)
        if body.stream:
            interval_s = self.admission.config.keep_alive_interval_s
            return EventStreamResponse(answer.events(), admitted.stream.aclose, interval_s)
        return await answer.whole()

    async def count_input(self, body: ResponseRequest, *, request_id: str) -> InputTokens:
        """How many tokens the model would read. Raises as ``create`` does, but answers nothing."""
        check_model(body.model, self.admission.config)
        chat = translate(body, self._history(body), self.store.message)
        with chat.own_names():
            prepared = await self.admission.prepare(chat.request, request_id=request_id)
            tokens = await self.admission.client.tokenize(prepared.request.prompt)
        return InputTokens(input_tokens=len(tokens))

    def retrieve(self, response_id: str) -> Response:
        """A stored response. Raises ``NotFoundError``."""
        stored = self.store.get(response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored.response

    def list_input(
        self, response_id: str, *, limit: int, order: Literal["asc", "desc"], after: str | None
    ) -> InputItemList:
        """A page of what a stored response answered. Raises ``NotFoundError``."""
        stored = self.store.get(response_id)
        if stored is None:
            raise _unknown(response_id)
        page = page_of(stored.input, limit=limit, order=order, after=after)
        if page is None:
            raise InvalidRequestError(
                "after: there is no such item", param="after", code="invalid_value"
            )
        return page

    def cancel(self, response_id: str) -> Response:
        """Only responses in the background can be cancelled, of which there are none."""
        if self.store.get(response_id) is None:
            raise _unknown(response_id)
        raise InvalidRequestError("Cannot cancel a synchronous response.", param="response_id")

    def delete(self, response_id: str) -> DeletedResponse:
        """Forget a stored response. Raises ``NotFoundError``."""
        if not self.store.delete(response_id):
            raise _unknown(response_id)
        return DeletedResponse(id=response_id)

    def _history(self, body: ResponseRequest) -> tuple[Message, ...]:
        if body.previous_response_id is None:
            return ()
        stored = self.store.get(body.previous_response_id)
        if stored is None:
            raise InvalidRequestError(
                f"There is no stored response {body.previous_response_id[:64]!r}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return stored.messages


def _record(body: ResponseRequest, chat: AdmittedChat) -> ResponseRecord:
    return ResponseRecord(
        body,
        chat.request.sampling,
        started=chat.stream.started,
        parser=None if chat.tool_use is None else chat.tool_use.parser(),
    )


def _unknown(response_id: str) -> NotFoundError:
    return NotFoundError(f"Response with id {response_id[:64]!r} not found.", param="response_id")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a response is to be stored, and with which input."""

    store: ResponseStore
    input: tuple[StoredItem, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An admitted request on its way to the client."""

    request_id: str
    stream: GenerationStream
    record: ResponseRecord
    chat: ResponseChat
    place: _Place | None
    """``None``: the client wants it forgotten."""

    async def whole(self) -> HTTPResponse:
        try:
            async for deltas in self.stream:
                for _ in self.record.add(deltas):
                    pass
        finally:
            await finish_despite_cancellation(self.stream.aclose())
        response = self._finished()
        return HTTPResponse(response.model_dump_json(), media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of each engine step as one piece: over Ray, pieces cost more than bytes."""
        writer = EventWriter()
        try:
            yield _encode(writer.opening(self.record.started()))
            async for deltas in self.stream:
                updates = self.record.add(deltas)
                if events := _encode(chain.from_iterable(map(writer.update, updates))):
                    yield events
            closing = writer.closing(self._finished())
        except Exception as error:
            # The status is out already. Events are the only way left to say that it went wrong.
            log_failure(error, self.request_id)
            closing = writer.failure(self.record.failed(error_body(error).error.message))
        yield _encode(closing)

    def _finished(self) -> Response:
        """The whole response, stored and logged."""
        response = self.record.whole()
        if self.place is not None:
            messages = (*self.chat.messages, *self.record.messages())
            output = {record.id: record.message() for record in self.record.items}
            self.place.store.put(StoredResponse(response, messages, self.place.input, output))
        logger.info(
            "finished request_id=%s response_id=%s status=%s",
            self.request_id,
            response.id,
            response.status,
        )
        return response


def _encode(events: Iterable[Event]) -> bytes:
    return b"".join(map(encode_named_event, events))
