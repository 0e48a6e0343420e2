"""What this server answers, as the OpenAPI document states it."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gemma_serve.generation import FinishReason

ChoiceFinishReason = Literal["stop", "length", "tool_calls"]

T = TypeVar("T")
AbsentIfNone = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""A field that is not written unless it says something."""


class ResponseModel(BaseModel):
    """Says all that is there, and nothing else."""

    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(ResponseModel):
    """``cached_tokens``: taken from a cache instead of computed."""

    cached_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(ResponseModel):
    """Gemma 3 does not reason apart from its answer."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class CompletionUsage(ResponseModel):
    """Tokens of one request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class AssistantAnswer(ResponseModel):
    """The message to append to the chat."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[str] = []


class TopLogprob(ResponseModel):
    """How probable the model found a token. ``bytes`` may be a part of a character's; ``null`` for
    a token that is no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    """A token of the answer, among the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseModel):
    """One entry for every token of the text, that of calls included."""

    content: list[ContentLogprob]
    refusal: None


class CalledFunction(ResponseModel):
    """``arguments`` is a JSON object as text."""

    name: str
    arguments: str


class AnsweredToolCall(ResponseModel):
    """A function that the model calls."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolCallingAnswer(ResponseModel):
    """The message to append to the chat, before the results of its calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    annotations: list[str] = []
    tool_calls: list[AnsweredToolCall]


class Choice(ResponseModel):
    """One of ``n`` answers."""

    index: int
    message: AssistantAnswer | ToolCallingAnswer
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChoiceFinishReason
    stop_reason: AbsentIfNone[str | int] = None
    token_ids: AbsentIfNone[list[int]] = None


class PromptLogprob(ResponseModel):
    """How probable the model found a token. ``rank`` from 1, where it is known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By place and token id; a prompt's first token has no probability."""


class ChatCompletion(ResponseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage
    prompt_token_ids: AbsentIfNone[list[int]] = None
    prompt_logprobs: AbsentIfNone[PromptLogprobs] = None


class FunctionDelta(ResponseModel):
    """The name once, then pieces of the arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """What is new of one call; ``id`` and ``type`` come with the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChoiceDelta(ResponseModel):
    """The role first, then pieces of content and calls, then nothing with the finish reason."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(ResponseModel):
    """What is new of one choice."""

    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: ChoiceFinishReason | None
    stop_reason: AbsentIfNone[str | int] = None
    token_ids: AbsentIfNone[list[int]] = None


class ChatCompletionChunk(ResponseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    prompt_token_ids: AbsentIfNone[list[int]] = None


class CompletionLogprobs(ResponseModel):
    """Lists of one length: an entry per token. A prompt's first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One of ``n`` continuations of one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: AbsentIfNone[str | int] = None
    prompt_token_ids: AbsentIfNone[list[int]] = None
    token_ids: AbsentIfNone[list[int]] = None
    prompt_logprobs: AbsentIfNone[PromptLogprobs] = None


class Completion(ResponseModel):
    """A whole plain completion, or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class Model(ResponseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(ResponseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetails(ResponseModel):
    """``param``: path of the field to blame. ``code``: for programs to tell errors apart."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetails


class Status(ResponseModel):
    """A sign of life."""

    status: Literal["ok"] = "ok"


class Version(ResponseModel):
    """Of this server."""

    version: str
