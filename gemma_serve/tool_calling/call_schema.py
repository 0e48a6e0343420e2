"""The JSON Schema of an answer that is certain to be a call, or to be one or have a format."""

import json
from collections.abc import Mapping, Sequence
from typing import Final

from gemma_serve.messages import ToolDefinition
from gemma_serve.tool_calling.choice import ToolChoice

MAX_FORCED_CALLS: Final = 32
"""In one answer: a small model would write a list without end."""

TEXT: Final = "$text"
"""Where the schema of a text stands among those of functions, none of which can be called so."""

_SCHEMA_MAPS: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
"""Keywords whose value has a schema under every key, which is a name and no keyword."""
_DATA: Final = frozenset({"const", "enum", "default", "examples", "example"})
_NULLABLE: Final = frozenset({"const", "default"})
_OPEN: Final = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"}
    | {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "minProperties"}
)
"""Keywords by which an object has, or may have, other properties than it lists."""


def tool_call_schema(
    tools: Sequence[ToolDefinition], choice: ToolChoice, *, parallel: bool
) -> dict[str, object]:
    """What an answer must be under ``required`` or ``named``: one call, or a list if ``parallel``.

    It is the JSON form of ``prompt.tool_prompt``. Each function's parameters stand under ``$defs``,
    and their own references lead there.
    """
    chosen = [tool for tool in tools if tool.name in choice.names]
    calls = [_call(tool.name) for tool in chosen]
    call: dict[str, object] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    definitions = {tool.name: _parameters(tool) for tool in chosen}
    if not parallel or choice.mode == "named":
        return {**call, "$defs": definitions}
    several = {"type": "array", "items": call, "minItems": 1, "maxItems": MAX_FORCED_CALLS}
    return {"anyOf": [call, several], "$defs": definitions}


def text_or_call_schema(
    text: Mapping[str, object],
    tools: Sequence[ToolDefinition],
    choice: ToolChoice,
    *,
    parallel: bool,
) -> dict[str, object]:
    """What an answer must be under ``auto`` if its text has a format: that, or calls as above."""
    calls = tool_call_schema(tools, choice, parallel=parallel)
    of_functions = calls.pop("$defs")
    assert isinstance(of_functions, dict)
    return {
        "anyOf": [{"$ref": f"#/$defs/{TEXT}"}, calls],
        "$defs": {TEXT: _embedded(text, TEXT), **of_functions},
    }


def _call(name: str) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _parameters(tool: ToolDefinition) -> dict[str, object]:
    """The schema of the arguments, closed where it lists all properties that it means.

    A schema without ``additionalProperties`` allows any; models that may go on, do.
    """
    given: dict[str, object] = json.loads(tool.parameters or '{"properties": {}}')
    moved = {"type": "object", **_embedded(given, tool.name)}
    is_open = "properties" not in moved or bool(_OPEN & moved.keys())
    return moved if is_open else {**moved, "additionalProperties": False}


def _embedded(schema: Mapping[str, object], name: str) -> dict[str, object]:
    """A document's ``schema`` as one of another's ``$defs``."""
    own = {key: value for key, value in schema.items() if key not in {"$schema", "$id", "id"}}
    return _moved(own, f"#/$defs/{name}")


def _moved(schema: Mapping[str, object], root: str) -> dict[str, object]:
    """``schema`` with its references to the document's root leading to ``root``.

    Keywords that are ``null`` are left out: clients write those for absent ones.
    """
    return {
        key: _moved_value(key, value, root)
        for key, value in schema.items()
        if value is not None or key in _NULLABLE
    }


def _moved_value(key: str, value: object, root: str) -> object:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return root + value[1:]
    if key in _DATA:
        return value
    if isinstance(value, Mapping):
        if key in _SCHEMA_MAPS:
            return {name: _moved_any(schema, root) for name, schema in value.items()}
        return _moved(value, root)
    if isinstance(value, list):
        return [_moved_any(item, root) for item in value]
    return value


def _moved_any(value: object, root: str) -> object:
    return _moved(value, root) if isinstance(value, Mapping) else value
