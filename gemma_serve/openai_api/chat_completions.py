"""One chat completion, from the parsed body to the last byte of the answer."""

import logging
import time
import uuid
from dataclasses import dataclass

from starlette.responses import Response

from gemma_serve.generation import GenerationClient
from gemma_serve.images.loader import ImageLoader
from gemma_serve.openai_api.admission import admit
from gemma_serve.openai_api.answers import Answer
from gemma_serve.openai_api.chat_requests import build_generation_request
from gemma_serve.openai_api.chat_responses import ChatCompletionBuilder
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.chat_tools import ToolRules
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.served_model import check_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatCompletions:
    """Answers chat completion requests with the help of a model."""

    client: GenerationClient
    config: ApiConfig
    image_loader: ImageLoader
    tool_rules: ToolRules

    async def create(
        self, body: ChatCompletionRequest, *, request_id: str, api_key_id: str | None = None
    ) -> Response:
        """Admit the request and answer it; ``request_id`` is what logs call it, here and there.

        ``api_key_id``: as ``Requester.of`` takes it.
        Raises whatever keeps the request from being admitted, so that it becomes a real status.
        """
        if body.model_extra and logger.isEnabledFor(logging.DEBUG):
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
            requester=Requester.of(
                body,
                api_key_id=api_key_id,
                share_prefix_cache=self.config.share_prefix_cache,
            ),
            tool_use=tool_use,
        )
        stream = await admit(self.client, request, body, tool_use)
        answer = Answer(
            request_id,
            stream,
            ChatCompletionBuilder(
                completion_id=f"chatcmpl-{uuid.uuid4().hex}",
                created=int(time.time()),
                model=self.config.model_name,
                n=request.n,
                started=stream.started,
                usage_in_stream=body.usage_in_stream,
                make_parser=None if tool_use is None else tool_use.parser,
                logprobs=request.sampling.logprobs is not None,
                return_token_ids=bool(body.return_token_ids),
            ),
        )
        if body.stream:
            return answer.streamed(self.config.keep_alive_interval_s)
        return await answer.whole()
