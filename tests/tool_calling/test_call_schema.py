"""The schema that makes a call certain."""

import json

import pytest

from gemma_serve.messages import ToolDefinition
from gemma_serve.tool_calling.call_schema import text_or_call_schema, tool_call_schema
from gemma_serve.tool_calling.choice import ToolChoice

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TIME = ToolDefinition("get_time")
WEATHER = ToolDefinition("get_weather", "Sun?", json.dumps(CITY))


def call_of(name: str) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def parameters_of(schema: dict[str, object]) -> object:
    """How the parameters of a function with ``schema`` are constrained."""
    tool = ToolDefinition("f", None, json.dumps(schema))
    definitions = tool_call_schema([tool], ToolChoice("named", ("f",)), parallel=True)["$defs"]
    assert isinstance(definitions, dict)
    return definitions["f"]


def test_named_function_is_one_call_whatever_may_run_in_parallel() -> None:
    schema = tool_call_schema([TIME, WEATHER], ToolChoice("named", ("get_weather",)), parallel=True)
    assert schema == {
        **call_of("get_weather"),
        "$defs": {"get_weather": {**CITY, "additionalProperties": False}},
    }


def test_required_call_is_any_of_the_functions_that_may_be_called() -> None:
    choice = ToolChoice("required", ("get_time", "get_weather"))
    tools = [TIME, ToolDefinition("other"), WEATHER]
    assert tool_call_schema(tools, choice, parallel=False) == {
        "anyOf": [call_of("get_time"), call_of("get_weather")],
        "$defs": {
            "get_time": {"type": "object", "properties": {}, "additionalProperties": False},
            "get_weather": {**CITY, "additionalProperties": False},
        },
    }


def test_parallel_calls_are_one_call_or_a_bounded_list() -> None:
    schema = tool_call_schema([TIME], ToolChoice("required", ("get_time",)), parallel=True)
    call = call_of("get_time")
    several = {"type": "array", "items": call, "minItems": 1, "maxItems": 32}
    assert schema["anyOf"] == [call, several]


def test_text_with_a_format_is_that_or_calls() -> None:
    text = {"$id": "x", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#"}}}
    choice = ToolChoice("auto", ("get_time",))
    calls = tool_call_schema([TIME], choice, parallel=True)
    assert text_or_call_schema(text, [TIME, WEATHER], choice, parallel=True) == {
        "anyOf": [{"$ref": "#/$defs/$text"}, {"anyOf": calls["anyOf"]}],
        "$defs": {
            "$text": {
                "properties": {"a": {"$ref": "#/$defs/$text/$defs/A"}},
                "$defs": {"A": {"$ref": "#/$defs/$text"}},
            },
            "get_time": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    }


def test_references_lead_to_where_the_parameters_stand() -> None:
    assert parameters_of(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "properties": {
                "node": {"$ref": "#/$defs/Node"},
                "$ref": {"enum": [{"$ref": "#"}]},
                "const": {"items": [{"$ref": "#"}, True], "pattern": None, "default": None},
            },
            "$defs": {"Node": {"anyOf": [{"$ref": "#/$defs/Node"}, {"const": {"$ref": "#"}}]}},
        }
    ) == {
        "type": "object",
        "properties": {
            "node": {"$ref": "#/$defs/f/$defs/Node"},
            "$ref": {"enum": [{"$ref": "#"}]},
            "const": {"items": [{"$ref": "#/$defs/f"}, True], "default": None},
        },
        "$defs": {"Node": {"anyOf": [{"$ref": "#/$defs/f/$defs/Node"}, {"const": {"$ref": "#"}}]}},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {}, "anyOf": [{"required": ["a"]}]},
    ],
)
def test_parameters_that_mean_to_be_open_stay_open(schema: dict[str, object]) -> None:
    assert parameters_of(schema) == schema
