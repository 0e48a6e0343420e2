"""The body of a chat completion request.

Every optional field takes ``null`` for absent. Fields that nobody declared are accepted, because
clients of other servers send them, and logged.
"""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from gemma_serve.openai_api.chat_messages import Message
from gemma_serve.openai_api.field_types import Bool, Int, Number, StopStrings, Text
from gemma_serve.openai_api.tool_schemas import MAX_TOOLS, Tool, ToolChoiceField
from gemma_serve.openai_api.unsupported_fields import UnsupportedFields

INT64_MAX: Final = 2**63 - 1
MAX_MESSAGES: Final = 50_000
"""Read in half a second, and twice as many turns as a context of 128K tokens can hold."""
MAX_TOKEN_IDS: Final = 1024
"""Each costs the engine time for every sequence."""

MaxTokens = Annotated[Int, Field(ge=1, le=INT64_MAX)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
# float32 logits stay finite within these bounds, whatever their own size.
RepetitionPenalty = Annotated[Number, Field(ge=0.01, le=100)]
TokenIdKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
LogitBias = Annotated[
    dict[TokenIdKey, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=MAX_TOKEN_IDS)
]
StopTokenIds = Annotated[list[Annotated[Int, Field(ge=0)]], Field(max_length=MAX_TOKEN_IDS)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: Bool | None = None


class ChatCompletionRequest(UnsupportedFields):
    """What this server reads of OpenAI's request, and of the fields that other servers added.

    Each description is the field's line in ``docs/api.md``.
    """

    model_config = ConfigDict(extra="allow")

    model: Text = Field(description="The served model's name, exactly.")
    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The chat so far, in any order of roles.",
    )
    max_completion_tokens: MaxTokens | None = Field(
        default=None, description="Tokens per choice. Wins over `max_tokens`."
    )
    max_tokens: MaxTokens | None = Field(
        default=None, description="The older name of `max_completion_tokens`."
    )
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 always takes the most probable token."
    )
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None, description="Keep the smallest set of tokens that is this probable."
    )
    top_k: Annotated[Int, Field(ge=-1, le=INT64_MAX)] | None = Field(
        default=None, description="Keep this many tokens; 0 and -1 keep all."
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Drop tokens less probable than this fraction of the most probable one.",
    )
    repetition_penalty: RepetitionPenalty | None = Field(
        default=None, description="Make tokens of the prompt and the answer less likely."
    )
    repeat_penalty: RepetitionPenalty | None = Field(
        default=None, description="Ollama's name of `repetition_penalty`, which wins over it."
    )
    presence_penalty: Penalty | None = Field(
        default=None, description="Make tokens of the answer less likely, once each."
    )
    frequency_penalty: Penalty | None = Field(
        default=None, description="Make tokens of the answer less likely, per occurrence."
    )
    logit_bias: LogitBias | None = Field(
        default=None,
        description="Token id (a string) to what is added to its logit, -100 to 100; -100 bans.",
    )
    seed: Annotated[Int, Field(ge=-(2**63), le=INT64_MAX)] | None = Field(
        default=None, description="The same request with the same seed gives the same answer."
    )
    stop: StopStrings | None = Field(
        default=None,
        description="Texts of up to 1,024 characters that end a choice and are not part of it.",
    )
    stop_token_ids: StopTokenIds | None = Field(
        default=None, description="Token ids that end a choice."
    )
    ignore_eos: Bool | None = Field(
        default=None, description="Go on when the model ends its turn: for benchmarks."
    )
    n: Annotated[Int, Field(ge=1, le=128)] | None = Field(
        default=None, description="How many choices to generate."
    )
    stream: Bool | None = Field(default=None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(
        default=None,
        description="Only with `stream`. `include_usage`: a last chunk counts the tokens.",
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
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
        description="`true` only if the last message is the assistant's, `false` only if not.",
    )
    add_generation_prompt: Bool | None = Field(
        default=None, description="`false` only if the last message is the assistant's."
    )
