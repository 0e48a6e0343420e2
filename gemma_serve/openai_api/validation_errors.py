"""From pydantic's words for a wrong body to OpenAI's."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi.exceptions import RequestValidationError

from gemma_serve.errors import InvalidRequestError

MAX_SHOWN_CHARS: Final = 64
"""Of an offending value. Data URLs are long."""

_CODES: Final = {
    "missing": "missing_required_parameter",
    "union_tag_not_found": "missing_required_parameter",
    "literal_error": "unsupported_value",
    "none_required": "unsupported_value",
    "union_tag_invalid": "unsupported_value",
    "unsupported": "unsupported_value",
}


def invalid_request(error: RequestValidationError) -> InvalidRequestError:
    """The first mistake that was found in the query or the body."""
    first: Mapping[str, Any] = error.errors()[0]  # pydantic's ErrorDetails
    if first["type"] == "json_invalid":
        reason, position = first["ctx"]["error"], first["loc"][-1]
        return InvalidRequestError(f"The body is not valid JSON: {reason} at character {position}")
    if first["loc"][0] == "query":
        return _invalid_query(first)
    if not isinstance(error.body, Mapping):
        return InvalidRequestError(
            "The body must be a JSON object, sent with content-type: application/json"
        )
    param = field_path(_location(first), error.body)
    code = _CODES.get(first["type"], "invalid_value")
    return InvalidRequestError(_sentence(first, param or "body"), param=param, code=code)


def _invalid_query(first: Mapping[str, Any]) -> InvalidRequestError:
    param = str(first["loc"][-1])
    code = _CODES.get(first["type"], "invalid_value")
    return InvalidRequestError(_sentence(first, param), param=param, code=code)


def _location(first: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where the mistake is, without the leading ``body``."""
    location: tuple[str | int, ...] = first["loc"][1:]
    if first["type"] == "union_tag_not_found":
        return (*location, first["ctx"]["discriminator"].strip("'"))
    return location


def field_path(location: Sequence[str | int], body: object) -> str | None:
    """Where ``location`` is in ``body``, written as OpenAI does: ``messages[0].content``.

    Besides keys and indexes, a location names the union members that were tried; those lead nowhere
    in the body. The last name of a missing field leads nowhere either, but belongs to the path.
    """
    path = ""
    value = body
    for depth, step in enumerate(location, start=1):
        if isinstance(value, list) and isinstance(step, int):
            path += f"[{step}]"
            value = value[step]
        elif isinstance(value, Mapping) and (step in value or depth == len(location)):
            path += f".{step}"
            value = value.get(step)
    return path.removeprefix(".") or None


def _sentence(first: Mapping[str, Any], param: str) -> str:
    match first["type"]:
        case "missing" | "union_tag_not_found":
            return f"Missing required parameter: {param}"
        case "none_required":
            return f"{param} is not supported by this server; leave it out"
        case "union_tag_invalid":
            tag, name = first["ctx"]["tag"], first["ctx"]["discriminator"]
            return (
                f"Invalid {param}: {name} must be one of {first['ctx']['expected_tags']}{_got(tag)}"
            )
        case _:
            return f"Invalid {param}: {first['msg']}{_got(first.get('input'))}"


def _got(value: object) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        shown = ascii(value[: MAX_SHOWN_CHARS + 1] if isinstance(value, str) else value)
        return f", got {shown[:MAX_SHOWN_CHARS]}{'…' if len(shown) > MAX_SHOWN_CHARS else ''}"
    return ""
