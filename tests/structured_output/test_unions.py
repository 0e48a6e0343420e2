import json

import pytest

from gemma_serve.structured_output.json_schemas import parse_schema

CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat", "default": "cat"}, "lives": {"type": "integer"}},
    "additionalProperties": False,
}
DOG = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "puppy"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
REFERENCES = [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
DISCRIMINATOR = {"propertyName": "kind"}


def parsed(schema: object) -> dict[str, object]:
    return parse_schema(json.dumps(schema))


def test_union_of_pydantic_models_is_told_apart_by_its_discriminator() -> None:
    schema = parsed(
        {
            "properties": {"pet": {"oneOf": REFERENCES, "discriminator": DISCRIMINATOR}},
            "$defs": {"Cat": CAT, "Dog": DOG},
        }
    )
    assert schema["properties"] == {"pet": {"anyOf": REFERENCES, "discriminator": DISCRIMINATOR}}
    assert schema["$defs"] == {"Cat": {**CAT, "required": ["kind"]}, "Dog": DOG}


def test_members_in_place_are_told_apart_too() -> None:
    assert parsed({"oneOf": [DOG, CAT]}) == {"anyOf": [DOG, {**CAT, "required": ["kind"]}]}


@pytest.mark.parametrize(
    "members",
    [
        [CAT, CAT],
        [CAT, {**DOG, "properties": {"kind": {"enum": ["dog", "cat"]}}}],
        [CAT, {**DOG, "properties": {"kind": {"type": "string"}}}],
        [CAT, {**DOG, "properties": {"sort": {"const": "dog"}}}],
        [CAT, {"properties": DOG["properties"]}],
        [CAT, {"$ref": "#/$defs/Nobody"}],
        [CAT, {"$ref": "#/oneOf/1"}],
        [CAT, {"$ref": "https://example.org/Dog"}],
        [CAT, True],
        [],
    ],
)
def test_union_that_nothing_tells_apart_is_left_as_it_is(members: list[object]) -> None:
    assert parsed({"oneOf": members}) == {"oneOf": members}


def test_union_beside_an_any_of_is_left_as_it_is() -> None:
    schema = {"oneOf": [CAT, DOG], "anyOf": [{}]}
    assert parsed(schema) == schema
