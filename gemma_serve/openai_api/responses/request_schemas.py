"""The body of a response request, OpenAI's newer endpoint."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gemma_serve.openai_api.chat_messages import check_num_parts
from gemma_serve.openai_api.chat_schemas import MAX_MESSAGES
from gemma_serve.openai_api.field_types import (
    Bool,
    Int,
    JsonObject,
    Text,
    at_most,
    check_text_or_list,
)
from gemma_serve.openai_api.requesters import RequesterFields
from gemma_serve.openai_api.response_schemas import AbsentIfNone
from gemma_serve.openai_api.responses.input_items import InputItem
from gemma_serve.openai_api.sampling_fields import INT64_MAX, TokenFields
from gemma_serve.openai_api.structured_outputs import FormatName
from gemma_serve.openai_api.tool_schemas import MAX_TOOLS, ChoiceMode, FunctionName, word_as_object


def _text_as_item(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),  # only the first mistake is told
    BeforeValidator(check_num_parts),
    BeforeValidator(_text_as_item, json_schema_input_type=str | list[InputItem]),
    BeforeValidator(check_text_or_list),
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
    name: FormatName
    schema_: JsonObject = Field(alias="schema")
    description: Text | None = None
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
    name: FunctionName
    description: Text | None = None
    parameters: dict[Text, object] | None = Field(default=None, description="A JSON Schema.")
    strict: Bool | None = Field(
        default=None, description="Without effect: calls that are certain always fit the schema."
    )


class NamedFunction(BaseModel):
    """The function to call."""

    type: Literal["function"]
    name: Text


class AllowedFunctions(BaseModel):
    """A choice among some of the functions, and whether one of them must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1)


ToolChoiceField = Annotated[
    ChoiceMode | NamedFunction | AllowedFunctions,
    Field(discriminator="type"),
    BeforeValidator(
        word_as_object,
        json_schema_input_type=Literal["none", "auto", "required"]
        | NamedFunction
        | AllowedFunctions,
    ),
]

# The others tell more of tools of other kinds than functions, of which there are none.
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class UnsupportedInResponses(BaseModel):
    """Fields that would change the answer; each takes only what asks for nothing."""

    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None


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
    tools: (
        Annotated[
            list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True), at_most(MAX_TOOLS)
        ]
        | None
    ) = Field(default=None, description="Functions that the model may call; see [Tools](#tools).")
    tool_choice: ToolChoiceField | None = Field(
        default=None, description="Whether the model may or must call, and which of them."
    )
    parallel_tool_calls: Bool | None = Field(default=None, description="`false`: at most one call.")
    max_tool_calls: Annotated[Int, Field(ge=1, le=INT64_MAX)] | None = Field(
        default=None, description="Without effect: it counts calls of hosted tools only."
    )
    include: Annotated[list[Included], Field(max_length=64)] | None = Field(
        default=None,
        description="`message.output_text.logprobs`: how probable each token was, as in "
        "[Logprobs](#logprobs). OpenAI's others tell nothing here.",
    )
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = Field(
        default=None,
        description="So many of the most probable tokens in each place, too. Above 0 it includes "
        "the logprobs.",
    )
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = Field(default=None, description="Told again in the response.")
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None,
        description="`auto`: too long an input loses its first turns. `disabled`: it is a 400.",
    )
    stream: Bool | None = Field(default=None, description="Answer as server-sent events.")

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer is to tell how probable its tokens were."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())
