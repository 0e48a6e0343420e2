"""Finds what is no JSON Schema before it is shown to a model or forced on it."""

from collections.abc import Iterator, Mapping
from typing import Final

_TYPES: Final = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})
_SCHEMA_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS: Final = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_MAX_DEPTH: Final = 64
"""Schemas within schemas. Whoever reads them does so by recursion."""


def schema_mistake(schema: Mapping[str, object]) -> tuple[str, str] | None:
    """Where the parameters of a function are wrong, from ``.`` on, and how; ``None``: nowhere.

    They must describe an object. Only what every validator refuses is a mistake, and not all of
    that: a keyword that is ``null`` is taken for absent, as in the rest of a request.
    """
    if (schema.get("type") or "object") != "object":
        return ".type", "the parameters of a function must be an object"
    return next(_mistakes(schema, "", 0), None)


def _mistakes(schema: object, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield path, "a schema must be an object or a boolean"
        return
    if depth >= _MAX_DEPTH:
        yield path, f"schemas may be nested {_MAX_DEPTH} deep"
        return
    given = {keyword: value for keyword, value in schema.items() if value is not None}
    yield from _own_mistakes(given, path)
    for inner_path, inner in _inner_schemas(given, path):
        yield from _mistakes(inner, inner_path, depth + 1)


def _own_mistakes(schema: Mapping[str, object], path: str) -> Iterator[tuple[str, str]]:
    types = schema.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in _TYPES:
            yield f"{path}.type", f"no such type; there are {', '.join(sorted(_TYPES))}"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield f"{path}.required", "must be a list of property names"
    if not isinstance(schema.get("enum", []), list):
        yield f"{path}.enum", "must be a list"
    for keyword in _SCHEMA_MAPS:
        if not isinstance(schema.get(keyword, {}), Mapping):
            yield f"{path}.{keyword}", "must be an object of schemas"
    for keyword in _SCHEMA_LISTS:
        if not isinstance(schema.get(keyword, []), list):
            yield f"{path}.{keyword}", "must be a list of schemas"


def _inner_schemas(schema: Mapping[str, object], path: str) -> Iterator[tuple[str, object]]:
    for keyword in _SCHEMA_MAPS:
        if isinstance(schemas := schema.get(keyword), Mapping):
            yield from ((f"{path}.{keyword}.{name}", inner) for name, inner in schemas.items())
    for keyword in _SCHEMA_LISTS:
        if isinstance(schemas := schema.get(keyword), list):
            yield from ((f"{path}.{keyword}[{i}]", inner) for i, inner in enumerate(schemas))
    for keyword in _SCHEMAS:
        if keyword not in schema:
            continue
        inner = schema[keyword]
        if isinstance(inner, list):  # before 2020-12, items could be a list
            yield from ((f"{path}.{keyword}[{i}]", each) for i, each in enumerate(inner))
        else:
            yield f"{path}.{keyword}", inner
