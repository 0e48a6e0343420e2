"""JSON Schemas in the words that FunctionGemma was trained on, which are those of Gemini's API.

It knows ``description``, ``enum``, ``items``, ``nullable``, ``properties``, ``required`` and
``type``, one type each and in capitals. What else a schema says is not told.
"""

from collections.abc import Mapping
from typing import Final

_MAX_DEPTH: Final = 16
"""Schemas within schemas, where references may lead in circles."""


def declared_schema(schema: Mapping[str, object]) -> dict[str, object]:
    """The parameters of a function, which are an object."""
    return _declared({"type": "object", **schema}, root=schema, depth=0)


def _declared(schema: object, root: Mapping[str, object], depth: int) -> dict[str, object]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return {}
    schema = _single(schema, root)
    declared: dict[str, object] = {}
    if isinstance(description := schema.get("description"), str):
        declared["description"] = description
    if "const" in schema or isinstance(schema.get("enum"), list):
        declared["enum"] = schema.get("enum") or [schema.get("const")]
    if "items" in schema:
        declared["items"] = _declared(schema["items"], root, depth + 1)
    if isinstance(properties := schema.get("properties"), Mapping):
        declared["properties"] = {
            name: _declared(inner, root, depth + 1) for name, inner in properties.items()
        }
    if isinstance(required := schema.get("required"), list) and required:
        declared["required"] = required
    return declared | _type(schema)


def _single(schema: Mapping[str, object], root: Mapping[str, object]) -> Mapping[str, object]:
    """``schema`` with what it refers to, or the first of what it may be, in its place."""
    own = {key: value for key, value in schema.items() if value is not None}
    for _ in range(_MAX_DEPTH):
        if isinstance(reference := own.pop("$ref", None), str):
            own = {**_referred(reference, root), **own}
            continue
        keyword = next((k for k in ("anyOf", "oneOf", "allOf") if own.get(k)), None)
        options = own.pop(keyword) if keyword else None
        if not isinstance(options, list):
            return own
        real = [o for o in options if isinstance(o, Mapping) and o.get("type") != "null"]
        nullable = {"nullable": True} if len(real) < len(options) else {}
        own = {**(real[0] if real else {}), **own, **nullable}
    return own


def _referred(reference: str, root: Mapping[str, object]) -> Mapping[str, object]:
    value: object = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if step and isinstance(value, Mapping):
            value = value.get(step)
    return value if isinstance(value, Mapping) and value is not root else {}


def _type(schema: Mapping[str, object]) -> dict[str, object]:
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    names = [str(name).upper() for name in kinds if name not in ("null", None)]
    told: dict[str, object] = {}
    if schema.get("nullable") or "null" in kinds:
        told["nullable"] = True
    return told | {"type": names[0]} if names else told
