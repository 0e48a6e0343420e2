"""The body of a chat completion request.

Every optional field takes ``null`` for absent. Fields that nobody declared are accepted, because
clients of other servers send them, and logged.
"""

from typing import Annotated, Final

from pydantic import BeforeValidator, ConfigDict, Field

from gemma_serve.openai_api.chat_messages import Message, check_num_parts
from gemma_serve.openai_api.field_types import Bool, Int, Number, Text, at_most
from gemma_serve.openai_api.sampling_fields import INT64_MAX, SamplingFields
from gemma_serve.openai_api.structured_outputs import StructuredOutputFields
from gemma_serve.openai_api.tool_schemas import MAX_TOOLS, Tool, ToolChoiceField
from gemma_serve.openai_api.unsupported_fields import UnsupportedFields

MAX_MESSAGES: Final = 50_000
"""Read in half a second, and twice as many turns as a context of 128K tokens can hold."""

MaxTokens = Annotated[Int, Field(ge=1, le=INT64_MAX)]

TemplateVariable = Bool | Int | Number | Text | None

Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),  # only the first mistake is told
    BeforeValidator(check_num_parts),
]


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), at_most(MAX_TOOLS)]


class ChatCompletionRequest(SamplingFields, StructuredOutputFields, UnsupportedFields):
    """What this server reads of OpenAI's request, and of the fields that other servers added.

    Each description is the field's line in ``docs/api.md``.
    """

    model_config = ConfigDict(extra="allow")

    model: Text = Field(description="The served model's name, exactly.")
    messages: Messages = Field(description="The chat so far, in any order of roles.")
    max_completion_tokens: MaxTokens | None = Field(
        default=None, description="Tokens per choice. Wins over `max_tokens`."
    )
    max_tokens: MaxTokens | None = Field(
        default=None, description="The older name of `max_completion_tokens`."
    )
    logprobs: Bool | None = Field(
        default=None,
        description="Tell how probable each token was to the model itself: before temperature, "
        "penalties and the like.",
    )
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = Field(
        default=None,
        description="Only with `logprobs`: so many of the most probable tokens in each place, too.",
    )
    tools: Tools | None = Field(
        default=None, description="Functions that the model may call; see [Tools](#tools)."
    )
    tool_choice: ToolChoiceField | None = Field(
        default=None, description="Whether the model may or must call, and which of them."
    )
    parallel_tool_calls: Bool | None = Field(
        default=None, description="`false`: at most one call per choice."
    )
    continue_final_message: Bool | None = Field(
        default=None,
        description="Go on with a last message of the assistant, or open a new turn.",
    )
    add_generation_prompt: Bool | None = Field(
        default=None, description="`false` only if the last message is continued."
    )
    chat_template_kwargs: dict[Text, TemplateVariable] | None = Field(
        default=None, description="Variables for the model's chat template to read."
    )
