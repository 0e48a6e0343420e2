"""JSON Schemas in the words that FunctionGemma was trained on, which are those of Gemini's API.

It knows ``description``, ``enum``, ``items``, ``nullable``, ``properties``, ``required`` and
``type``, one type each and in capitals. What else a schema says is not told.
"""

from collections.abc import Mapping
from typing import Final

_MAX_DEPTH: Final = 16
"""Schemas within schemas, where references may lead in circles."""
_MAX_PARTS: Final = 2000
"""Schemas within one. References that lead to many others make more of them than anyone reads, and
without a bound more than there is time for."""


def declared_schema(schema: Mapping[str, object]) -> dict[str, object]:
    """The parameters of a function, which are an object."""
    return _Declaration(schema).of({"type": "object", **schema}, depth=0)


class _Declaration:
    """Tells one schema; what is beyond the bounds is told as anything."""

    def __init__(self, root: Mapping[str, object]) -> None:
        self._root = root
        self._num_parts = 0

    def of(self, schema: object, depth: int) -> dict[str, object]:
        self._num_parts += 1
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH or self._num_parts > _MAX_PARTS:
            return {}
        schema = self._single(schema)
        declared: dict[str, object] = {}
        if isinstance(description := schema.get("description"), str):
            declared["description"] = description
        if "const" in schema or isinstance(schema.get("enum"), list):
            declared["enum"] = schema.get("enum") or [schema.get("const")]
        if "items" in schema:
            declared["items"] = self.of(schema["items"], depth + 1)
        if isinstance(properties := schema.get("properties"), Mapping):
            declared["properties"] = {
                name: self.of(inner, depth + 1) for name, inner in properties.items()
            }
        if isinstance(required := schema.get("required"), list) and required:
            declared["required"] = required
        return declared | _type(schema)

    def _single(self, schema: Mapping[str, object]) -> Mapping[str, object]:
        """``schema`` with what it refers to, or the first of what it may be, in its place."""
        own = {key: value for key, value in schema.items() if value is not None}
        for _ in range(_MAX_DEPTH):
            if isinstance(reference := own.pop("$ref", None), str):
                own = {**self._referred(reference), **own}
                continue
            keyword = next((k for k in ("anyOf", "oneOf", "allOf") if own.get(k)), None)
            options = own.pop(keyword) if keyword else None
            if not isinstance(options, list):
                break
            real = [o for o in options if isinstance(o, Mapping) and o.get("type") != "null"]
            nullable = {"nullable": True} if len(real) < len(options) else {}
            own = {**(real[0] if real else {}), **own, **nullable}
        return own

    def _referred(self, reference: str) -> Mapping[str, object]:
        value: object = self._root
        for step in reference.removeprefix("#").strip("/").split("/"):
            if step and isinstance(value, Mapping):
                value = value.get(step)
        return value if isinstance(value, Mapping) and value is not self._root else {}


def _type(schema: Mapping[str, object]) -> dict[str, object]:
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    names = [str(name).upper() for name in kinds if name not in ("null", None)]
    told: dict[str, object] = {}
    if schema.get("nullable") or "null" in kinds:
        told["nullable"] = True
    return told | {"type": names[0]} if names else told
