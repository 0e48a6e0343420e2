"""What is no schema is found, and where."""

import pytest

from gemma_serve.tool_calling.parameter_check import schema_mistake


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "object"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "string"}, ".type"),
        ({"type": ["object"]}, ".type"),
        ({"properties": []}, ".properties"),
        ({"properties": {"a": 5}}, ".properties.a"),
        ({"properties": {"a": {"type": "str"}}}, ".properties.a.type"),
        ({"properties": {"a": {"type": ["string", 5]}}}, ".properties.a.type"),
        ({"required": True}, ".required"),
        ({"required": [1]}, ".required"),
        ({"properties": {"a": {"enum": "x"}}}, ".properties.a.enum"),
        ({"anyOf": {}}, ".anyOf"),
        ({"anyOf": [{}, {"type": "x"}]}, ".anyOf[1].type"),
        ({"properties": {"a": {"items": [{}, 5]}}}, ".properties.a.items[1]"),
        ({"$defs": {"A": {"items": {"type": "any"}}}}, ".$defs.A.items.type"),
        (nested(64), ".properties.a" * 64),
    ],
)
def test_mistake_is_named_by_its_path(schema: dict[str, object], path: str) -> None:
    mistake = schema_mistake(schema)
    assert mistake is not None
    assert mistake[0] == path


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"type": {"type": ["string", "null"]}}, "required": []},
        {"properties": {"a": True, "b": {"items": {"$ref": "#/$defs/A"}}}, "$defs": {"A": {}}},
        {"additionalProperties": False, "x-order": 5, "title": 1},
        {"type": None, "required": None, "properties": {"a": {"enum": None, "items": None}}},
        nested(63),
    ],
)
def test_schema_has_no_mistake(schema: dict[str, object]) -> None:
    assert schema_mistake(schema) is None
