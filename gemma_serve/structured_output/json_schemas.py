"""From a client's JSON Schema to a grammar, and from a grammar's error to a place in the schema."""

import json
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Final

from llguidance import LLMatcher

from gemma_serve.errors import OutputConstraintError
from gemma_serve.structured_output.unions import Schema, open_told_apart

_MAX_DEPTH: Final = 100
"""Of nested JSON. The compiler is recursive and ends at 128."""

_MAX_SEARCH_S: Final = 1.0

_ENFORCED_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
"""Of ``format``; JSON Schema lets other values be annotations only."""

_NEUTRAL: Final[Mapping[str, Sequence[object]]] = {
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
}
"""Keywords that are not enforced, with the values that ask for nothing. zod writes that a record's
names are strings."""

_SAYS_MORE: Final = frozenset(
    {
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "unevaluatedProperties",
        "dependentRequired",
        "minProperties",
    }
)
"""Beside ``properties``, what tells of others."""
_OF_OBJECTS: Final = _SAYS_MORE | {"properties", "required"}

_WHITESPACE: Final = r" |\n {0,32}"
"""Matched at most once wherever JSON allows whitespace. Without a bound, a small model may never
stop writing it; without any, answers differ from how models write JSON."""

_NAMED = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_LISTED = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames")
_SINGLE_IN_PLACE = ("not", "if", "then", "else", "unevaluatedItems", "unevaluatedProperties")


def parse_schema(text: str) -> Schema:
    """Read a schema, leave out what constrains nothing, open unions that are told apart, and close
    objects that list what they have.

    Raises ``OutputConstraintError``.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise OutputConstraintError(f"The schema is not JSON: {error}") from None
    _check_depth(schema)
    _check_text(schema)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise OutputConstraintError("The schema must be a JSON object")
    _simplify(schema)
    _close(schema)
    return schema


def schema_grammar(schema: Schema) -> str:
    """The grammar of compact or indented JSON that fits ``schema``."""
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE}
    )


def place_of_error(schema: Schema) -> str | None:
    """The innermost part of a refused ``schema`` that is refused by itself, as a path.

    Compiles part after part, and stops where it is when that has taken long enough.
    """
    path = ""
    part: object = schema
    deadline = perf_counter() + _MAX_SEARCH_S
    while isinstance(part, dict) and perf_counter() < deadline:
        refused = ((step, sub) for step, sub in _parts(part) if _is_refused(sub, schema))
        step, part = next(refused, ("", None))
        path += step
    return path.removeprefix(".") or None


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise OutputConstraintError(f"The schema is nested deeper than {_MAX_DEPTH} levels")


def _check_text(value: object) -> None:
    """JSON can name half of a surrogate pair, and no compiler or answer can write it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise OutputConstraintError("The schema holds half of a surrogate pair") from None


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _simplify(schema: Schema) -> None:
    for part in _all_parts(schema):
        name = part.get("format")
        if isinstance(name, str) and name not in _ENFORCED_FORMATS:
            del part["format"]
        for keyword, neutral in _NEUTRAL.items():
            if keyword in part and part[keyword] in neutral:
                del part[keyword]
        _leave_out_implied_sizes(part)
        open_told_apart(part, schema)


def _close(schema: Schema) -> None:
    """Objects get no properties but those that are listed, where nothing says or shows that others
    are meant; small models write new ones without end. What fits then fits what was asked for.

    Where one object is described in several places, none of them lists all that it has.
    """
    parts = list(_all_parts(schema))
    if any(_is_one_of_several(part) for part in parts):
        return
    for part in parts:
        listed, required = part.get("properties"), part.get("required", [])
        if not isinstance(listed, dict) or not listed or _SAYS_MORE & part.keys():
            continue
        if isinstance(required, list) and all(
            isinstance(name, str) and name in listed for name in required
        ):
            part["additionalProperties"] = False


def _is_one_of_several(part: Schema) -> bool:
    """Whether an object must fit this and something else, or must not fit something else."""
    return bool(
        {"allOf", "oneOf"} & part.keys()
        or ({"$ref", "anyOf"} & part.keys() and _OF_OBJECTS & part.keys())
    )


def _all_parts(schema: Schema) -> Iterator[Schema]:
    pending: list[object] = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield part
            pending.extend(sub for _, sub in _parts(part))


def _leave_out_implied_sizes(schema: Schema) -> None:
    """The compiler refuses bounds on an object's size beside optional keys, also those that every
    object meets: with fewer keys than are required, or more than there can be."""
    required, listed = schema.get("required"), schema.get("properties", {})
    least, most = schema.get("minProperties"), schema.get("maxProperties")
    if isinstance(least, int) and isinstance(required, list):
        num_required = len({name for name in required if isinstance(name, str)})
        if least <= num_required:
            del schema["minProperties"]
    is_closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if isinstance(most, int) and isinstance(listed, dict) and is_closed and most >= len(listed):
        del schema["maxProperties"]


def _parts(schema: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The schemas in ``schema``, each with its step of the path. Definitions come first."""
    for keyword in _NAMED:
        named = schema.get(keyword)
        if isinstance(named, dict):
            yield from ((f".{keyword}.{name}", sub) for name, sub in named.items())
    for keyword in _LISTED:
        listed = schema.get(keyword)
        if isinstance(listed, list):
            yield from ((f".{keyword}[{index}]", sub) for index, sub in enumerate(listed))
    for keyword in _SINGLE + _SINGLE_IN_PLACE:
        single = schema.get(keyword)
        if isinstance(single, dict):
            yield f".{keyword}", single


def _is_refused(part: object, root: Schema) -> bool:
    if not isinstance(part, dict):
        return not isinstance(part, bool)
    definitions: Schema = {key: root[key] for key in ("$defs", "definitions") if key in root}
    # Broken definitions break whoever refers to them, and no one else.
    return bool(LLMatcher.validate_grammar(schema_grammar({**part, **definitions})))
