"""The messages of a chat completion request, by role.

Clients replay whole assistant messages of any server, so unknown keys are skipped here.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gemma_serve.openai_api.field_types import Text, check_text_or_list
from gemma_serve.openai_api.limits import MAX_CONTENT_PARTS


class TextContentPart(BaseModel):
    """Text."""

    type: Literal["text"]
    text: Text


class RefusalContentPart(BaseModel):
    """Text with which an assistant declined."""

    type: Literal["refusal"]
    refusal: Text


class ImageUrl(BaseModel):
    """Where an image is, and how closely to look at it."""

    url: Annotated[Text, Field(min_length=1, description="An https: or a data: URL.")]
    detail: Literal["auto", "low", "high"] | None = Field(
        default=None,
        description="low: one view. high: crops besides. auto: crops only of long images.",
    )


def _url_as_object(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


class ImageContentPart(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl, BeforeValidator(_url_as_object, json_schema_input_type=str | ImageUrl)
    ]


def _text_as_part(value: object) -> object:
    value = check_text_or_list(value)
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


AssistantPart = Annotated[TextContentPart | RefusalContentPart, Field(discriminator="type")]
UserPart = Annotated[TextContentPart | ImageContentPart, Field(discriminator="type")]
# A union of one has no discriminator; every other part type fails on ``type``.
TextContent = Annotated[
    list[TextContentPart],
    BeforeValidator(_text_as_part, json_schema_input_type=str | list[TextContentPart]),
]
UserContent = Annotated[
    list[UserPart], BeforeValidator(_text_as_part, json_schema_input_type=str | list[UserPart])
]
AssistantContent = Annotated[
    list[AssistantPart],
    BeforeValidator(_text_as_part, json_schema_input_type=str | list[AssistantPart]),
]


class FunctionCall(BaseModel):
    """What an assistant called."""

    name: Text
    arguments: Text = Field(description="A JSON object as a string.")


class ToolCallItem(BaseModel):
    """One call of an assistant."""

    id: Text
    type: Literal["function"] | None = "function"
    function: FunctionCall


class SystemMessage(BaseModel):
    """Instructions; ``developer`` is another word for ``system``."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(BaseModel):
    """What the user says and shows."""

    role: Literal["user"]
    content: UserContent


class AssistantMessage(BaseModel):
    """What the model said; all of it may be missing."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    refusal: Text | None = None
    tool_calls: list[ToolCallItem] | None = None
    function_call: FunctionCall | None = Field(default=None, description="Before tool_calls.")


class ToolMessage(BaseModel):
    """The result of one tool call."""

    role: Literal["tool"]
    content: TextContent
    tool_call_id: Text


class FunctionMessage(BaseModel):
    """The result of a call by the deprecated ``function_call``."""

    role: Literal["function"]
    content: TextContent | None = None
    name: Text


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]


def check_num_parts(messages: object) -> object:
    """Refuse too many parts before any of them costs a check."""
    if not isinstance(messages, list):
        return messages
    num_parts = sum(_num_parts(message) for message in messages)
    if num_parts > MAX_CONTENT_PARTS:
        raise PydanticCustomError(
            "too_long",
            "At most {limit} content parts and tool calls are allowed, not {length}",
            {"limit": MAX_CONTENT_PARTS, "length": num_parts},
        )
    return messages


def _num_parts(message: object) -> int:
    if not isinstance(message, dict):
        return 0
    # "output" holds the parts of a function's result among the items of a response request.
    values = (message.get(name) for name in ("content", "tool_calls", "output"))
    return sum(len(value) for value in values if isinstance(value, list))
