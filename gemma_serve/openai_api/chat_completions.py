"""One chat completion, from the parsed body to the last byte of the answer."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from starlette.responses import Response

from gemma_serve.errors import NotFoundError
from gemma_serve.generation import GenerationClient, GenerationStream
from gemma_serve.images.loader import ImageLoader
from gemma_serve.openai_api.chat_requests import build_generation_request
from gemma_serve.openai_api.chat_responses import ChatCompletionBuilder, ChunkPayload
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.chat_tools import ToolRules
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.disconnects import finish_despite_cancellation
from gemma_serve.openai_api.error_responses import error_body, log_failure
from gemma_serve.openai_api.sse import DONE, EventStreamResponse, encode_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatCompletions:
    """Answers chat completion requests with the help of a model."""

    client: GenerationClient
    config: ApiConfig
    image_loader: ImageLoader
    tool_rules: ToolRules

    async def create(self, body: ChatCompletionRequest, *, request_id: str) -> Response:
        """Admit the request and answer it; ``request_id`` is what logs call it, here and there.

        Raises whatever keeps the request from being admitted, so that it becomes a real status.
        """
        if body.model_extra:
            logger.debug("ignored request_id=%s fields=%a", request_id, sorted(body.model_extra))
        check_model(body.model, self.config)
        description = await self.client.describe()
        tool_use = self.tool_rules.apply(body, description)
        request = await build_generation_request(
            body,
            request_id=request_id,
            description=description,
            image_loader=self.image_loader,
            image_limits=self.config.limits.images,
            tool_use=tool_use,
        )
        stream = await self.client.generate(request)
        answer = _Answer(
            request_id,
            stream,
            ChatCompletionBuilder(
                completion_id=f"chatcmpl-{uuid.uuid4().hex}",
                created=int(time.time()),
                model=self.config.model_name,
                n=request.n,
                started=stream.started,
                stream_usage=_wants_usage(body),
                make_parser=None if tool_use is None else tool_use.parser,
            ),
        )
        if body.stream:
            return EventStreamResponse(answer.events(), stream.aclose)
        return await answer.whole()


def check_model(name: str, config: ApiConfig) -> None:
    """Raise ``NotFoundError`` unless ``name`` is the served model."""
    if name != config.model_name:
        raise NotFoundError(
            f"The model {name[:128]!r} does not exist; this server has {config.model_name!r}",
            param="model",
            code="model_not_found",
        )


def _wants_usage(body: ChatCompletionRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage is True


@dataclass(frozen=True, slots=True)
class _Answer:
    """An admitted request on its way to the client."""

    request_id: str
    stream: GenerationStream
    builder: ChatCompletionBuilder

    async def whole(self) -> Response:
        try:
            async for deltas in self.stream:
                self.builder.add(deltas)
        finally:
            await finish_despite_cancellation(self.stream.aclose())
        completion = self.builder.completion()
        self._log_finished()
        return Response(completion.model_dump_json(), media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of each engine step as one piece: over Ray, pieces cost more than bytes."""
        builder = self.builder
        try:
            yield _encode(builder.role_chunks())
            async for deltas in self.stream:
                if events := _encode(builder.delta_chunks(builder.add(deltas))):
                    yield events
            builder.require_finished()
            yield _encode(builder.usage_chunks()) + DONE
        except Exception as error:
            # The status is out already. An event is the only way left to say that it went wrong.
            log_failure(error, self.request_id)
            yield encode_event(error_body(error).model_dump()) + DONE
        else:
            self._log_finished()

    def _log_finished(self) -> None:
        usage = self.builder.usage
        logger.info(
            "finished request_id=%s completion_id=%s reasons=%s prompt_tokens=%d "
            "cached_tokens=%d completion_tokens=%d",
            self.request_id,
            self.builder.completion_id,
            ",".join(reason or "none" for reason in self.builder.finish_reasons),
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
        )


def _encode(chunks: Iterable[ChunkPayload]) -> bytes:
    return b"".join(map(encode_event, chunks))
