import json

import pytest

from gemma_serve.errors import OutputConstraintError
from gemma_serve.generation import OutputConstraint
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import error_of, make_app, post_chat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_CONSTRAINT = OutputConstraint(kind="json_schema", value=json.dumps(SCHEMA))
ANY_OBJECT = OutputConstraint(kind="json_object", value="")
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
CHOICE = OutputConstraint(kind="choice", value='["yes", "no"]')
REGEX = OutputConstraint(kind="regex", value="a+")
GRAMMAR = OutputConstraint(kind="grammar", value='root ::= "a"')


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": None}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": {}}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, SCHEMA_CONSTRAINT),
        ({"response_format": JSON_SCHEMA}, SCHEMA_CONSTRAINT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "answer",
                        "schema": SCHEMA,
                        "strict": False,
                        "description": "x",
                    },
                }
            },
            SCHEMA_CONSTRAINT,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA_CONSTRAINT),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, SCHEMA_CONSTRAINT),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+", "json": None}}, REGEX),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, CHOICE),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, GRAMMAR),
        ({"guided_json": SCHEMA}, SCHEMA_CONSTRAINT),
        ({"guided_json": json.dumps(SCHEMA)}, SCHEMA_CONSTRAINT),
        ({"guided_regex": "a+"}, REGEX),
        ({"guided_choice": ["yes", "no"]}, CHOICE),
        ({"guided_grammar": 'root ::= "a"'}, GRAMMAR),
        ({"json_schema": SCHEMA}, SCHEMA_CONSTRAINT),
        ({"regex": "a+"}, REGEX),
        ({"grammar": 'root ::= "a"'}, GRAMMAR),
        ({"ebnf": 'root ::= "a"'}, GRAMMAR),
        ({"format": "json"}, ANY_OBJECT),
        ({"format": SCHEMA}, SCHEMA_CONSTRAINT),
        ({"response_format": {"type": "text"}, "regex": "a+"}, REGEX),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "format": "markdown", "regex": ""}, None),
        ({}, None),
    ],
)
async def test_every_way_to_ask_means_the_same(
    fields: dict[str, object], constraint: OutputConstraint | None
) -> None:
    client = FakeGenerationClient(*answer("{}"))
    response = await post_chat(make_app(client), **fields)
    assert response.status_code == 200, response.text
    assert client.requests[0].output_constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
        ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
        ({"guided_regex": "\ud800"}, "guided_regex"),
        ({"regex": 5}, "regex"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex"),
    ],
)
async def test_malformed_format_is_a_400_that_names_it(
    fields: dict[str, object], param: str
) -> None:
    response = await post_chat(make_app(FakeGenerationClient()), **fields)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("fields", "place", "param"),
    [
        ({"response_format": JSON_SCHEMA}, None, "response_format.json_schema.schema"),
        (
            {"response_format": JSON_SCHEMA},
            "properties.a",
            "response_format.json_schema.schema.properties.a",
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            "properties.a",
            "response_format.schema.properties.a",
        ),
        ({"guided_json": SCHEMA}, "anyOf[0]", "guided_json.anyOf[0]"),
        ({"structured_outputs": {"regex": "("}}, None, "structured_outputs.regex"),
    ],
)
async def test_format_that_the_model_cannot_enforce_is_an_error_of_its_field(
    fields: dict[str, object], place: str | None, param: str
) -> None:
    refused = OutputConstraintError("it is odd", param=place, code="invalid_value")
    client = FakeGenerationClient(generate_error=refused)
    response = await post_chat(make_app(client), stream=True, **fields)
    assert response.status_code == 400
    assert error_of(response) == {
        "message": "it is odd",
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_value",
    }


def test_place_that_is_an_index_follows_its_field_without_a_dot() -> None:
    assert OutputConstraintError("x", param="[0]").under("choices").param == "choices[0]"
