"""Responses: made, streamed, stored, continued, deleted."""

import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.responses import Response as HTTPResponse

from gemma_serve.errors import InvalidRequestError, NotFoundError
from gemma_serve.generation import GenerationClient, GenerationStream
from gemma_serve.images.loader import ImageLoader
from gemma_serve.openai_api.admission import admit
from gemma_serve.openai_api.chat_messages import AssistantMessage, Message, TextContentPart
from gemma_serve.openai_api.chat_requests import build_generation_request
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.disconnects import finish_despite_cancellation
from gemma_serve.openai_api.error_responses import error_body, log_failure
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.responses.builder import ResponseBuilder
from gemma_serve.openai_api.responses.chat_translation import ResponseChat, translate
from gemma_serve.openai_api.responses.request_schemas import ResponseRequest
from gemma_serve.openai_api.responses.response_schemas import DeletedResponse, Response
from gemma_serve.openai_api.responses.store import ResponseStore, StoredResponse
from gemma_serve.openai_api.served_model import check_model
from gemma_serve.openai_api.sse import EventStreamResponse, encode_named_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Responses:
    """Answers response requests with the help of a model."""

    client: GenerationClient
    config: ApiConfig
    image_loader: ImageLoader
    store: ResponseStore

    async def create(
        self, body: ResponseRequest, *, request_id: str, api_key_id: str | None = None
    ) -> HTTPResponse:
        """Admit the request and answer it; ``request_id`` is what logs call it.

        ``api_key_id``: as ``Requester.of`` takes it.
        Raises whatever keeps the request from being admitted, so that it becomes a real status.
        """
        check_model(body.model, self.config)
        chat = translate(body, self._history(body))
        with chat.own_names():
            request = await build_generation_request(
                chat.request,
                request_id=request_id,
                description=await self.client.describe(),
                image_loader=self.image_loader,
                image_limits=self.config.limits.images,
                requester=Requester.of(
                    body,
                    api_key_id=api_key_id,
                    share_prefix_cache=self.config.share_prefix_cache,
                ),
            )
            stream = await admit(self.client, request, chat.request)
        builder = ResponseBuilder(body, request.sampling, started=stream.started)
        answer = _Answer(request_id, stream, builder, chat, self.store if _stores(body) else None)
        if body.stream:
            interval_s = self.config.keep_alive_interval_s
            return EventStreamResponse(answer.events(), stream.aclose, interval_s)
        return await answer.whole()

    def retrieve(self, response_id: str) -> Response:
        """A stored response. Raises ``NotFoundError``."""
        stored = self.store.get(response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored.response

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


def _stores(body: ResponseRequest) -> bool:
    return body.store is not False


def _unknown(response_id: str) -> NotFoundError:
    return NotFoundError(f"There is no stored response {response_id[:64]!r}", param="response_id")


@dataclass(frozen=True, slots=True)
class _Answer:
    """An admitted request on its way to the client."""

    request_id: str
    stream: GenerationStream
    builder: ResponseBuilder
    chat: ResponseChat
    store: ResponseStore | None
    """``None``: the client wants it forgotten."""

    async def whole(self) -> HTTPResponse:
        try:
            async for deltas in self.stream:
                self.builder.add(deltas)
        finally:
            await finish_despite_cancellation(self.stream.aclose())
        response = self._finished()
        return HTTPResponse(response.model_dump_json(), media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        builder = self.builder
        try:
            yield b"".join(map(encode_named_event, builder.opening_events()))
            async for deltas in self.stream:
                if events := b"".join(map(encode_named_event, builder.delta_events(deltas))):
                    yield events
            closing = builder.closing_events(self._finished())
        except Exception as error:
            # The status is out already. Events are the only way left to say that it went wrong.
            log_failure(error, self.request_id)
            closing = builder.failure_events(error_body(error).error.message)
        yield b"".join(map(encode_named_event, closing))

    def _finished(self) -> Response:
        """The whole response, stored and logged."""
        response = self.builder.response()
        if self.store is not None:
            said = TextContentPart(type="text", text=self.builder.text)
            answer = AssistantMessage(role="assistant", content=[said])
            self.store.put(StoredResponse(response, (*self.chat.messages, answer)))
        logger.info(
            "finished request_id=%s response_id=%s status=%s",
            self.request_id,
            response.id,
            response.status,
        )
        return response
