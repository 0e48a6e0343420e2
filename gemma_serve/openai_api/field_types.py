"""The values that request fields are made of. JSON's types are kept apart: no ``"1"`` for 1."""

import json
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool
from pydantic_core import PydanticCustomError

Bool = StrictBool
Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _check_encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "lone_surrogate",
            "Character {position} is half of a surrogate pair, which is not text",
            {"position": error.start},
        ) from None
    return text


Text = Annotated[str, AfterValidator(_check_encodable)]
"""Anything that can be written as UTF-8, NUL included."""


def _check_json(value: dict[str, object]) -> dict[str, object]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        raise PydanticCustomError(
            "no_json",
            "It holds what is no JSON: NaN, Infinity, half of a surrogate pair, or too many levels",
        ) from None
    return value


JsonObject = Annotated[dict[str, object], AfterValidator(_check_json)]
"""An object that can be told again."""


def at_most(limit: int) -> BeforeValidator:
    """Refuse a longer list or object by its length, before any of its items costs a check.

    pydantic counts the items that are valid: of a million invalid ones it would report each.
    """

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > limit:
            raise PydanticCustomError(
                "too_long",
                "At most {limit} items are allowed, not {length}",
                {"limit": limit, "length": len(value)},
            )
        return value

    return BeforeValidator(check)


def check_text_or_list(value: object) -> object:
    """For a ``BeforeValidator`` of a list for which a string may stand: pydantic's own words for
    another value know of the list only."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("text_or_list", "Input should be a string or a list")
    return value


def _string_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=1024)]],
    Field(max_length=16),
    at_most(16),
    BeforeValidator(_string_as_list, json_schema_input_type=str | list[str]),
    BeforeValidator(check_text_or_list),
]
"""A list, for which a single string may stand. Each is searched for after every token."""
