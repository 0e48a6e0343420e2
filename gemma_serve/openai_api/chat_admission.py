"""A chat from its parsed body to the stream of its answer, whichever endpoint it came to."""

from dataclasses import dataclass, replace
from typing import Literal

from gemma_serve.errors import ContextLengthError
from gemma_serve.generation import (
    ChatPrompt,
    GenerationClient,
    GenerationRequest,
    GenerationStream,
)
from gemma_serve.images.loader import ImageLoader
from gemma_serve.openai_api.admission import admit, log_ignored_fields
from gemma_serve.openai_api.chat_requests import build_generation_request
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.chat_tools import ToolRules, ToolUse
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.history_truncation import shortened
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.served_model import check_model

Truncation = Literal["auto", "disabled"]
"""What becomes of a chat that does not fit the context: it loses its first turns, or is refused."""


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat as the model is asked to answer it."""

    request: GenerationRequest
    tool_use: ToolUse | None
    """``None``: the answer is text, whatever it looks like."""


@dataclass(frozen=True, slots=True)
class AdmittedChat(PreparedChat):
    """A chat that the model has taken on."""

    stream: GenerationStream


@dataclass(frozen=True, slots=True)
class ChatAdmission:
    """Checks chats and hands them to the model."""

    client: GenerationClient
    config: ApiConfig
    image_loader: ImageLoader
    tool_rules: ToolRules

    async def prepare(
        self, body: ChatCompletionRequest, *, request_id: str, api_key_id: str | None = None
    ) -> PreparedChat:
        """``api_key_id``: as ``Requester.of`` takes it. Raises ``RequestError``."""
        log_ignored_fields(body, request_id)
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
                body, api_key_id=api_key_id, share_prefix_cache=self.config.share_prefix_cache
            ),
            tool_use=tool_use,
        )
        return PreparedChat(request, tool_use)

    async def admit(
        self,
        body: ChatCompletionRequest,
        *,
        request_id: str,
        api_key_id: str | None = None,
        truncation: Truncation = "disabled",
    ) -> AdmittedChat:
        """As ``prepare``, and raises whatever keeps the model from taking the chat on."""
        prepared = await self.prepare(body, request_id=request_id, api_key_id=api_key_id)
        request, tool_use = prepared.request, prepared.tool_use
        try:
            stream = await admit(self.client, request, body, tool_use)
        except ContextLengthError:
            if truncation == "disabled" or not isinstance(request.prompt, ChatPrompt):
                raise
            prompt = await shortened(self.client, request.prompt)
            if prompt is None:
                raise
            request = replace(request, prompt=prompt)
            stream = await admit(self.client, request, body, tool_use)
        return AdmittedChat(request, tool_use, stream)
