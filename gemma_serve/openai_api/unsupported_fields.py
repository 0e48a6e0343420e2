"""Fields that this server does not act on and that change what an answer means.

Ignoring one would silently give another answer than was asked for, so each accepts only the values
that ask for nothing; the rest is a 400 that names it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator


def empty_as_absent(value: object) -> object:
    """For a ``BeforeValidator``: what is empty asks for nothing."""
    return value or None


UnsupportedIfSet = Annotated[None, BeforeValidator(empty_as_absent)]
"""Something empty asks for nothing either."""


class UnsupportedFields(BaseModel):
    """What a later release may lift, a field at a time."""

    functions: UnsupportedIfSet = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None
    stop_regex: UnsupportedIfSet = None
    use_beam_search: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logits_processors: UnsupportedIfSet = None
    truncation_side: Literal["left"] | None = None
    echo: Literal[False] | None = None
    chat_template: UnsupportedIfSet = None
    documents: UnsupportedIfSet = None
