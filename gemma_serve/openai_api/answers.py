"""An admitted request on its way to the client, whole or as events."""

import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from starlette.responses import Response

from gemma_serve.generation import GenerationStream
from gemma_serve.openai_api.chat_responses import ChatCompletionBuilder, ChunkPayload
from gemma_serve.openai_api.completion_responses import CompletionBuilder, CompletionPayload
from gemma_serve.openai_api.disconnects import finish_despite_cancellation
from gemma_serve.openai_api.error_responses import error_body, log_failure
from gemma_serve.openai_api.sse import DONE, EventStreamResponse, encode_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """An admitted request on its way to the client."""

    request_id: str
    stream: GenerationStream
    builder: ChatCompletionBuilder | CompletionBuilder

    def streamed(self, keep_alive_interval_s: float) -> Response:
        """Events as the model goes on, and a sign of life where it takes its time."""
        return EventStreamResponse(self.events(), self.stream.aclose, keep_alive_interval_s)

    async def whole(self) -> Response:
        """One JSON object once all is there."""
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
            if opening := _encode(builder.opening_chunks()):
                yield opening
            async for deltas in self.stream:
                if events := _encode(builder.delta_chunks(deltas)):
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


def _encode(chunks: Iterable[ChunkPayload | CompletionPayload]) -> bytes:
    return b"".join(map(encode_event, chunks))
