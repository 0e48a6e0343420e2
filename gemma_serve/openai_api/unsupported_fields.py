"""Fields that this server does not act on and that change what an answer means.

Ignoring one would silently give another answer than was asked for, so each accepts only the values
that ask for nothing; the rest is a 400 that names it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _empty_as_absent(value: object) -> object:
    return value or None


def _refuse_json(value: object) -> object:
    # Ollama's field: "json" or a schema constrain the answer, anything else does nothing.
    if value == "json" or isinstance(value, dict):
        raise PydanticCustomError("unsupported", "Structured output is not supported yet")
    return value


UnsupportedIfSet = Annotated[None, BeforeValidator(_empty_as_absent)]
"""Something empty asks for nothing either."""


class TextFormat(BaseModel):
    """The one format: no constraint."""

    type: Literal["text"]


class UnsupportedFields(BaseModel):
    """What a later release may lift, a field at a time."""

    functions: UnsupportedIfSet = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    format: Annotated[object, BeforeValidator(_refuse_json)] = Field(
        default=None, description="Ollama's response_format."
    )
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    prompt_logprobs: None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None
    structured_outputs: UnsupportedIfSet = None
    guided_json: UnsupportedIfSet = None
    guided_regex: UnsupportedIfSet = None
    guided_choice: UnsupportedIfSet = None
    guided_grammar: UnsupportedIfSet = None
    json_schema: UnsupportedIfSet = None
    grammar: UnsupportedIfSet = None
    regex: UnsupportedIfSet = None
    ebnf: UnsupportedIfSet = None
    min_tokens: Literal[0] | None = None
    bad_words: UnsupportedIfSet = None
    allowed_token_ids: UnsupportedIfSet = None
    stop_regex: UnsupportedIfSet = None
    include_stop_str_in_output: Literal[False] | None = None
    no_stop_trim: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    echo: Literal[False] | None = None
    chat_template: UnsupportedIfSet = None
    documents: UnsupportedIfSet = None
