"""``oneOf`` whose members a property tells apart, as the ``anyOf`` that means the same.

The compiler finds out by itself that members exclude each other, but not through references, which
is how pydantic and OpenAPI write their discriminated unions.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Final

Schema = dict[str, object]

_MAX_REFERENCES: Final = 16
"""From a member to what it is. More is a circle."""


def open_told_apart(part: Schema, root: Schema) -> None:
    """Write ``part``'s ``oneOf`` as ``anyOf`` if that allows nothing more.

    A member need not require the property (pydantic's have a default); from then on it does, as
    without it an object would fit several members, and so not ``oneOf``.
    """
    members = part.get("oneOf")
    if not isinstance(members, list) or not members or "anyOf" in part:
        return
    objects = [_resolved(member, root) for member in members]
    shared = _telling_property([member for member in objects if member is not None])
    if None in objects or shared is None:
        return
    part["anyOf"] = part.pop("oneOf")
    for member in objects:
        assert member is not None
        required = _required(member)
        if shared not in required:
            member["required"] = [*required, shared]


def _resolved(member: object, root: Schema) -> Schema | None:
    """The object's schema that ``member`` is or refers to; ``None`` if it is no such thing."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(member, dict):
            return None
        if "$ref" not in member:
            return member if member.get("type") == "object" else None
        member = _target(member["$ref"], root)
    return None


def _target(reference: object, root: Schema) -> object:
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target: object = root
    for step in reference.removeprefix("#/").split("/"):
        if not isinstance(target, dict):
            return None
        target = target.get(step.replace("~1", "/").replace("~0", "~"))
    return target


def _telling_property(members: Sequence[Schema]) -> str | None:
    """A property whose value no two of ``members`` have in common."""
    values = [_constants(member) for member in members]
    for name in values[0] if values else ():
        sets = [constants.get(name, frozenset()) for constants in values]
        if all(sets) and len(frozenset().union(*sets)) == sum(map(len, sets)):
            return name
    return None


def _constants(member: Schema) -> Mapping[str, frozenset[str]]:
    """The JSON values that each property may have, of those that may have only some."""
    properties = member.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {
        name: frozenset(json.dumps(value, sort_keys=True) for value in _choices(schema))
        for name, schema in properties.items()
    }


def _choices(schema: object) -> Sequence[object]:
    match schema:
        case {"const": value}:
            return [value]
        case {"enum": list(values)}:
            return values
        case _:
            return []


def _required(member: Schema) -> Sequence[object]:
    required = member.get("required")
    return required if isinstance(required, list) else []
