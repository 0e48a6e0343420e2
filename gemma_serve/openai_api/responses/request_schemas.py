"""The body of a response request, OpenAI's newer endpoint."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gemma_serve.openai_api.chat_messages import check_num_parts
from gemma_serve.openai_api.chat_schemas import MAX_MESSAGES
from gemma_serve.openai_api.field_types import Bool, Int, Text
from gemma_serve.openai_api.requesters import RequesterFields
from gemma_serve.openai_api.response_schemas import AbsentIfNone
from gemma_serve.openai_api.responses.input_items import InputItem
from gemma_serve.openai_api.sampling_fields import INT64_MAX, TokenFields


def _text_as_item(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),  # only the first mistake is told
    BeforeValidator(check_num_parts),
    BeforeValidator(_text_as_item, json_schema_input_type=str | list[InputItem]),
]


class PlainText(BaseModel):
    """No constraint."""

    type: Literal["text"] = "text"


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    """JSON that a schema describes."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, object] = Field(alias="schema")
    description: str | None = None
    strict: Bool | None = None


class TextOptions(BaseModel):
    """The form of the text."""

    format: (
        Annotated[PlainText | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
        | None
    ) = None
    verbosity: AbsentIfNone[Literal["low", "medium", "high"]] = None


class FunctionTool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, object] | None = Field(default=None, description="A JSON Schema.")
    strict: Bool | None = None


class NamedFunction(BaseModel):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class UnsupportedInResponses(BaseModel):
    """Fields that would change the answer; each takes only what asks for nothing."""

    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None


class ResponseRequest(TokenFields, RequesterFields, UnsupportedInResponses):
    """What this server reads of OpenAI's request, besides the fields that choose tokens."""

    model_config = ConfigDict(extra="allow")

    model: Text = Field(description="The served model's name, exactly.")
    input: Input = Field(
        description="Text, or messages, function calls and their results, in any order."
    )
    instructions: Text | None = Field(
        default=None, description="A system message before everything else, for this answer only."
    )
    previous_response_id: Text | None = Field(
        default=None, description="Go on with the chat of a stored response."
    )
    store: Bool | None = Field(
        default=None, description="`false` forgets the response once it is sent."
    )
    max_output_tokens: Annotated[Int, Field(ge=1, le=INT64_MAX)] | None = Field(
        default=None, description="Tokens of the answer."
    )
    text: TextOptions | None = Field(
        default=None, description="`format`: as `response_format` of a chat."
    )
    tools: list[FunctionTool] | None = Field(
        default=None,
        description="Checked, then left out of the prompt: a response calls no functions yet.",
    )
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = Field(
        default=None, description="`none` or `auto`, which are the same here so far."
    )
    parallel_tool_calls: Bool | None = Field(
        default=None, description="Without effect, as no functions are called."
    )
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = Field(default=None, description="Told again in the response.")
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="Without effect: too long an input is a 400."
    )
    stream: Bool | None = Field(default=None, description="Answer as server-sent events.")
