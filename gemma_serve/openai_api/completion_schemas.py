"""The body of a plain completion request, OpenAI's older endpoint."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from gemma_serve.openai_api.field_types import Bool, Int, Text, at_most
from gemma_serve.openai_api.sampling_fields import INT64_MAX, SamplingFields, TokenId
from gemma_serve.openai_api.structured_outputs import StructuredOutputFields
from gemma_serve.openai_api.unsupported_fields import UnsupportedIfSet

DEFAULT_MAX_TOKENS: Final = 16
MAX_PROMPTS: Final = 128
"""Each is a request of its own to the engine, whose queue is not much longer."""

PromptTokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _kind_of_prompt(value: object) -> str | None:
    match value:
        case str():
            return "text"
        case [str(), *_]:
            return "texts"
        case [int(), *_]:
            return "token_ids"
        case [list(), *_]:
            return "token_id_lists"
        case _:
            return None


PromptField = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[
        list[Text],
        Field(max_length=MAX_PROMPTS, fail_fast=True),
        at_most(MAX_PROMPTS),
        Tag("texts"),
    ]
    | Annotated[PromptTokenIds, Tag("token_ids")]
    | Annotated[
        list[PromptTokenIds],
        Field(max_length=MAX_PROMPTS, fail_fast=True),
        at_most(MAX_PROMPTS),
        Tag("token_id_lists"),
    ],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="It must be a string, token ids, or a list of either that is not "
        "empty",
    ),
]


class UnsupportedInCompletions(BaseModel):
    """Fields that would change the answer; each takes only what asks for nothing."""

    suffix: UnsupportedIfSet = None
    use_beam_search: Literal[False] | None = None
    stop_regex: UnsupportedIfSet = None
    logits_processors: UnsupportedIfSet = None
    prompt_embeds: UnsupportedIfSet = None
    truncation_side: Literal["left"] | None = None


class CompletionRequest(SamplingFields, StructuredOutputFields, UnsupportedInCompletions):
    """What this server reads of OpenAI's request, and of the fields that other servers added."""

    model_config = ConfigDict(extra="allow")

    model: Text = Field(description="The served model's name, exactly.")
    prompt: PromptField = Field(
        description="Text, token ids, or up to 128 of either. Text gets the model's first token; "
        "token ids are read as they are."
    )
    max_tokens: Annotated[Int, Field(ge=0, le=INT64_MAX)] | None = Field(
        default=None, description="Tokens per choice. 0 only with `echo`."
    )
    best_of: Annotated[Int, Field(ge=1, le=128)] | None = Field(
        default=None, description="Only as much as `n`: no choice is thrown away."
    )
    echo: Bool | None = Field(default=None, description="Begin each choice with the prompt.")
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = Field(
        default=None,
        description="Tell how probable each token was, and so many of the most probable ones.",
    )
    add_special_tokens: Bool | None = Field(
        default=None, description="`false` leaves a text without the model's first token."
    )
