"""Request fields that chats and plain completions share: how tokens are chosen, and how many.

Each description is the field's line in ``docs/api.md``.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field

from gemma_serve.openai_api.field_types import Bool, Int, Number, StopStrings, Text, at_most
from gemma_serve.openai_api.requesters import RequesterFields

INT64_MAX: Final = 2**63 - 1
MAX_TOKEN_IDS: Final = 1024
"""Each costs the engine time for every sequence."""
MAX_BAD_WORDS: Final = 128
"""Each costs the engine time for every token."""

Penalty = Annotated[Number, Field(ge=-2, le=2)]
# float32 logits stay finite within these bounds, whatever their own size.
RepetitionPenalty = Annotated[Number, Field(ge=0.01, le=100)]
TokenIdKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
LogitBias = Annotated[
    dict[TokenIdKey, Annotated[Number, Field(ge=-100, le=100)]],
    Field(max_length=MAX_TOKEN_IDS),
    at_most(MAX_TOKEN_IDS),
]
TokenId = Annotated[Int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS), at_most(MAX_TOKEN_IDS)]
BadWords = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=1024)]],
    Field(max_length=MAX_BAD_WORDS),
    at_most(MAX_BAD_WORDS),
]

StreamUsage = Literal["none", "last", "every"]
"""Which chunks of a stream count the tokens so far. Where only the last one does, the others have
``null``."""


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: Bool | None = None
    continuous_usage_stats: Bool | None = Field(
        default=None, description="vLLM's: with `include_usage`, every chunk counts the tokens."
    )


class TokenFields(BaseModel):
    """How tokens are chosen, and which ones end a choice. ``null`` is absent."""

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
    allowed_token_ids: TokenIds | None = Field(
        default=None, description="The only token ids that may be chosen."
    )
    bad_words: BadWords | None = Field(
        default=None,
        description="Words whose usual tokens are banned; other tokens may still spell them.",
    )
    seed: Annotated[Int, Field(ge=-(2**63), le=INT64_MAX)] | None = Field(
        default=None, description="The same request with the same seed gives the same answer."
    )
    stop: StopStrings | None = Field(
        default=None,
        description="Texts of up to 1,024 characters that end a choice and are not part of it.",
    )
    include_stop_str_in_output: Bool | None = Field(
        default=None, description="Make the text that ended a choice part of it."
    )
    no_stop_trim: Bool | None = Field(
        default=None, description="SGLang's name of `include_stop_str_in_output`, which wins."
    )
    stop_token_ids: TokenIds | None = Field(
        default=None, description="Token ids that end a choice."
    )
    min_tokens: Annotated[Int, Field(ge=0, le=INT64_MAX)] | None = Field(
        default=None, description="Before so many tokens, only the token limit ends a choice."
    )
    ignore_eos: Bool | None = Field(
        default=None, description="Go on when the model ends its turn: for benchmarks."
    )
    skip_special_tokens: Bool | None = Field(
        default=None, description="`false` shows control tokens by their names."
    )
    speculation: Bool | None = Field(
        default=None,
        description="`false`: no token is guessed, even if the operator turned that on.",
    )


class SamplingFields(TokenFields, RequesterFields):
    """The same, who asks, and what of the answer is told."""

    truncate_prompt_tokens: Annotated[Int, Field(ge=1, le=INT64_MAX)] | None = Field(
        default=None, description="Keep only so many tokens of the prompt's end."
    )
    return_token_ids: Bool | None = Field(
        default=None, description="Tell the token ids of the prompt and of each choice."
    )
    return_tokens_as_token_ids: Bool | None = Field(
        default=None, description="Write the tokens of `logprobs` as `token_id:7`."
    )
    prompt_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = Field(
        default=None,
        description="vLLM's: how probable each token of the prompt was, and so many of the most "
        "probable ones. Not with `stream`.",
    )
    n: Annotated[Int, Field(ge=1, le=128)] | None = Field(
        default=None, description="How many choices to generate."
    )
    stream: Bool | None = Field(default=None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(
        default=None,
        description="Only with `stream`. `include_usage`: a last chunk counts the tokens; with "
        "`continuous_usage_stats`, every chunk does.",
    )

    @property
    def stream_usage(self) -> StreamUsage:
        """Which chunks of a stream are to count the tokens."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "none"
        return "every" if options.continuous_usage_stats else "last"
