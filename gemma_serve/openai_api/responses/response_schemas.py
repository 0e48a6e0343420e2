"""What the responses endpoint answers, as the OpenAPI document states it."""

from typing import Literal

from pydantic import Field

from gemma_serve.openai_api.response_schemas import ResponseModel
from gemma_serve.openai_api.responses.request_schemas import (
    AllowedFunctions,
    FunctionTool,
    NamedFunction,
    TextOptions,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions


class OutputTopLogprob(ResponseModel):
    """How probable the model found a token; ``bytes`` are empty for one that is no text."""

    token: str
    logprob: float
    bytes: list[int]


class OutputLogprob(OutputTopLogprob):
    """A token of the text, among the most probable ones in its place."""

    top_logprobs: list[OutputTopLogprob]


class OutputText(ResponseModel):
    """A piece of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: tuple[str, ...] = ()
    logprobs: list[OutputLogprob] = Field(default_factory=list)


class OutputMessage(ResponseModel):
    """What the model said."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class FunctionCallItem(ResponseModel):
    """A function that the model calls; ``arguments`` is a JSON object as text."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | FunctionCallItem


class InputTokensDetails(ResponseModel):
    """``cached_tokens``: taken from a cache instead of computed."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(ResponseModel):
    """Gemma 3 does not reason apart from its answer."""

    reasoning_tokens: int = 0


class ResponseUsage(ResponseModel):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class IncompleteDetails(ResponseModel):
    """Why a response ends too early."""

    reason: Literal["max_output_tokens"]


class ResponseError(ResponseModel):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class Reasoning(ResponseModel):
    """Gemma 3 does none."""

    effort: None = None
    summary: None = None


class Response(ResponseModel):
    """One answer of the model, and what it was asked for with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    model: str
    output: list[OutputItem]
    previous_response_id: str | None
    parallel_tool_calls: bool
    tools: list[FunctionTool]
    tool_choice: ToolChoice
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int = 0
    max_output_tokens: int | None
    max_tool_calls: int | None
    reasoning: Reasoning = Reasoning()
    text: TextOptions
    truncation: Literal["auto", "disabled"] = "disabled"
    store: bool
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"
    metadata: dict[str, str]
    safety_identifier: None = None
    prompt_cache_key: None = None
    usage: ResponseUsage | None = None


class DeletedResponse(ResponseModel):
    """A response that is no longer stored."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(ResponseModel):
    """The size of an input, images and functions included."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
