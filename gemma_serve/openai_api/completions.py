"""One plain completion, from the parsed body to the last byte of the answer."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response

from gemma_serve.generation import GenerationClient, GenerationRequest, GenerationStream
from gemma_serve.openai_api.admission import admit, log_ignored_fields
from gemma_serve.openai_api.answers import Answer
from gemma_serve.openai_api.completion_requests import build_generation_requests
from gemma_serve.openai_api.completion_responses import AdmittedPrompt, CompletionBuilder
from gemma_serve.openai_api.completion_schemas import CompletionRequest
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.disconnects import finish_despite_cancellation
from gemma_serve.openai_api.merged_streams import close_all, merge_streams
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.served_model import check_model


@dataclass(frozen=True, slots=True)
class Completions:
    """Answers plain completion requests with the help of a model."""

    client: GenerationClient
    config: ApiConfig

    async def create(
        self, body: CompletionRequest, *, request_id: str, api_key_id: str | None = None
    ) -> Response:
        """Admit all prompts and answer them; ``request_id`` is what logs call the request.

        ``api_key_id``: as ``Requester.of`` takes it.
        Raises whatever keeps one of them from being admitted, so that it becomes a real status.
        """
        log_ignored_fields(body, request_id)
        check_model(body.model, self.config)
        requests = build_generation_requests(
            body,
            request_id=request_id,
            description=await self.client.describe(),
            requester=Requester.of(
                body,
                api_key_id=api_key_id,
                share_prefix_cache=self.config.share_prefix_cache,
            ),
        )
        streams = await self._admit(requests, body)
        builder = CompletionBuilder(
            body,
            completion_id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.config.model_name,
            prompts=[
                AdmittedPrompt(request.prompt, stream.started)
                for request, stream in zip(requests, streams, strict=True)
            ],
        )
        answer = Answer(request_id, merge_streams(streams, n=body.n or 1), builder)
        if body.stream:
            return answer.streamed(self.config.keep_alive_interval_s)
        return await answer.whole()

    async def _admit(
        self, requests: Sequence[GenerationRequest], body: CompletionRequest
    ) -> list[GenerationStream]:
        """All of them, or none."""
        streams: list[GenerationStream] = []
        try:
            for request in requests:
                streams.append(await admit(self.client, request, body))
        except BaseException:
            await finish_despite_cancellation(close_all(streams))
            raise
        return streams
