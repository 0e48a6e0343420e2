"""Text to tokens and back, in the form of vLLM's ``/tokenize`` and ``/detokenize``."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import GenerationClient, Prompt, TextPrompt, TokenPrompt
from gemma_serve.openai_api.chat_admission import ChatAdmission
from gemma_serve.openai_api.chat_schemas import (
    ChatCompletionRequest,
    Messages,
    TemplateVariable,
    Tools,
)
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.field_types import Bool, Text
from gemma_serve.openai_api.response_schemas import AbsentIfNone, ResponseModel
from gemma_serve.openai_api.sampling_fields import TokenId
from gemma_serve.openai_api.sampling_params import check_token_id
from gemma_serve.openai_api.served_model import check_model


class TokenizeRequest(BaseModel):
    """A text, or a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[Text, TemplateVariable] | None = None
    continue_final_message: Bool | None = None
    add_generation_prompt: Bool | None = None
    add_special_tokens: Bool | None = Field(
        default=None, description="`false` leaves a text without the model's first token."
    )
    return_token_strs: Bool | None = None


class Tokenized(ResponseModel):
    """The tokens that the model would read."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: AbsentIfNone[list[str]] = None


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Detokenized(ResponseModel):
    """The text that the tokens write, control tokens by their names."""

    prompt: str


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Answers both with the help of a model."""

    client: GenerationClient
    config: ApiConfig
    admission: ChatAdmission

    async def tokenize(self, body: TokenizeRequest) -> Tokenized:
        """Raises ``RequestError``, ``UnavailableError``."""
        self._check_model(body.model)
        tokens = await self.client.tokenize(await self._prompt(body))
        names = [token.written.decode(errors="replace") for token in tokens]
        return Tokenized(
            count=len(tokens),
            max_model_len=(await self.client.describe()).max_model_len,
            tokens=[token.token_id for token in tokens],
            token_strs=names if body.return_token_strs else None,
        )

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        """Raises ``RequestError``, ``UnavailableError``."""
        self._check_model(body.model)
        description = await self.client.describe()
        for index, token_id in enumerate(body.tokens):
            check_token_id(token_id, description, param=f"tokens[{index}]")
        tokens = await self.client.tokenize(TokenPrompt(tuple(body.tokens)))
        written = b"".join(token.written for token in tokens)
        return Detokenized(prompt=written.decode(errors="replace"))

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            check_model(name, self.config)

    async def _prompt(self, body: TokenizeRequest) -> Prompt:
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError(
                "Either prompt or messages must be given", param="prompt", code="invalid_value"
            )
        if body.prompt is not None:
            return TextPrompt(body.prompt, body.add_special_tokens is not False)
        chat = await self.admission.prepare(_chat_request(body, self.config), request_id="")
        return chat.request.prompt


def _chat_request(body: TokenizeRequest, config: ApiConfig) -> ChatCompletionRequest:
    assert body.messages is not None
    return ChatCompletionRequest(
        model=config.model_name,
        messages=body.messages,
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        continue_final_message=body.continue_final_message,
        add_generation_prompt=body.add_generation_prompt,
    )
