"""What FunctionGemma is told, in the words of its documentation."""

import json

import pytest

from gemma_serve.messages import TextPart, ToolCall, ToolDefinition, ToolOffer
from gemma_serve.tool_calling.function_gemma import function_gemma_parser
from gemma_serve.tool_calling.function_gemma_prompt import (
    TRIGGER,
    ControlPart,
    PromptPart,
    call_parts,
    developer_parts,
    response_parts,
)
from gemma_serve.tool_calling.function_gemma_schema import declared_schema
from tests.tool_calling.answers import outcome

WEATHER = ToolDefinition(
    "get_current_weather",
    "Gets the current weather in a given location.",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "unit": {
                    "type": "string",
                    "enum": ["celsius", "fahrenheit"],
                    "description": "The unit to return the temperature in.",
                },
                "location": {
                    "type": "string",
                    "description": 'The city and state, e.g. "San Francisco, CA" or "Tokyo, JP"',
                },
            },
            "required": ["location"],
        }
    ),
)
# The documentation's own example.
DECLARATION = (
    "<start_function_declaration>declaration:get_current_weather{description:<escape>Gets the "
    "current weather in a given location.<escape>,parameters:{properties:{location:{description:"
    '<escape>The city and state, e.g. "San Francisco, CA" or "Tokyo, JP"<escape>,type:<escape>'
    "STRING<escape>},unit:{description:<escape>The unit to return the temperature in.<escape>,"
    "enum:[<escape>celsius<escape>,<escape>fahrenheit<escape>],type:<escape>STRING<escape>}},"
    "required:[<escape>location<escape>],type:<escape>OBJECT<escape>}}<end_function_declaration>"
)
TIME = ToolDefinition("get_time")
TIME_DECLARATION = (
    "<start_function_declaration>declaration:get_time{description:<escape><escape>}"
    "<end_function_declaration>"
)


def written(parts: tuple[PromptPart, ...]) -> str:
    return "".join(
        part.token if isinstance(part, ControlPart) else part.text
        for part in parts
        if isinstance(part, ControlPart | TextPart)
    )


def test_functions_are_declared_as_documented() -> None:
    parts = developer_parts((), ToolOffer(definitions=(WEATHER,)))
    assert written(parts) == TRIGGER + DECLARATION
    assert parts[1] == ControlPart("<start_function_declaration>")


def test_functions_stand_behind_each_other_and_only_those_that_may_be_called() -> None:
    offer = ToolOffer(definitions=(WEATHER, TIME))
    assert written(developer_parts((), offer)) == TRIGGER + DECLARATION + TIME_DECLARATION
    offer = ToolOffer(definitions=(WEATHER, TIME), allowed=("get_time",))
    assert written(developer_parts((), offer)) == TRIGGER + TIME_DECLARATION


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Today is Friday.", f"Today is Friday.\n{TRIGGER}"),
        (f"Today is Friday. {TRIGGER}:", f"Today is Friday. {TRIGGER}:"),
    ],
)
def test_instructions_come_before_the_functions(said: str, expected: str) -> None:
    parts = developer_parts((TextPart(said),), ToolOffer(definitions=(TIME,)))
    assert written(parts) == expected + TIME_DECLARATION


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"location": "Tokyo, Japan"}', "{location:<escape>Tokyo, Japan<escape>}"),
        (
            '{"b": [1, "x", true], "a": {"n": null, "f": -2.5}}',
            "{a:{f:-2.5,n:null},b:[1,<escape>x<escape>,true]}",
        ),
        ("", "{}"),
        ("{broken", "{value:<escape>{broken<escape>}"),
    ],
)
def test_earlier_calls_are_as_the_model_writes_them(arguments: str, expected: str) -> None:
    parts = call_parts(ToolCall("c1", "f", arguments))
    assert written(parts) == f"<start_function_call>call:f{expected}<end_function_call>"


def test_calls_are_read_as_they_are_shown() -> None:
    arguments = '{"a": [1, "x {y}", {"b": null}], "c": true}'
    text = written(call_parts(ToolCall("c1", "f", arguments)))
    assert outcome(function_gemma_parser(("f",)), [text]) == [("f", arguments)]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (
            '{"temperature": 15, "weather": "sunny"}',
            "{temperature:15,weather:<escape>sunny<escape>}",
        ),
        ("Sunny, 15 °C", "{value:<escape>Sunny, 15 °C<escape>}"),
        ("[1, 2]", "{value:[1,2]}"),
        ("", "{value:<escape><escape>}"),
        ("[" * 65 + "]" * 65, None),
        ("[" * 99_999, None),
        ('{"a": ' * 900 + "1" + "}" * 900, None),
    ],
)
def test_results_are_members_or_a_value(result: str, expected: str | None) -> None:
    expected = f"{{value:<escape>{result}<escape>}}" if expected is None else expected
    assert written(response_parts("f", result)) == (
        f"<start_function_response>response:f{expected}<end_function_response>"
    )


def test_tokens_in_what_clients_write_are_text() -> None:
    parts = response_parts("f", "<end_function_response><escape>")
    assert [part.token for part in parts if isinstance(part, ControlPart)] == [
        "<start_function_response>",
        "<escape>",
        "<escape>",
        "<end_function_response>",
    ]
    assert TextPart("<end_function_response><escape>") in parts


OPTIONAL = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "A"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {"type": "OBJECT"}),
        (
            {"properties": {"a": OPTIONAL}},
            {"properties": {"a": {"type": "INTEGER", "nullable": True}}, "type": "OBJECT"},
        ),
        (
            {"properties": {"a": {"type": ["string", "null"]}}, "required": []},
            {"properties": {"a": {"type": "STRING", "nullable": True}}, "type": "OBJECT"},
        ),
        (
            {
                "properties": {"a": {"$ref": "#/$defs/A", "description": "An A"}},
                "$defs": {"A": {"type": "array", "items": {"const": 5}}},
            },
            {
                "properties": {
                    "a": {"description": "An A", "items": {"enum": [5]}, "type": "ARRAY"}
                },
                "type": "OBJECT",
            },
        ),
        (
            {"properties": {"a": {"$ref": "#/nowhere"}, "b": True}},
            {"properties": {"a": {}, "b": {}}, "type": "OBJECT"},
        ),
    ],
)
def test_schemas_are_told_in_the_words_that_the_model_knows(
    schema: dict[str, object], expected: dict[str, object]
) -> None:
    assert declared_schema(schema) == expected


def test_schema_that_refers_to_itself_comes_to_an_end() -> None:
    tree = {"type": "object", "properties": {"child": {"$ref": "#/$defs/Tree"}}}
    declared: object = declared_schema({**tree, "$defs": {"Tree": tree}})
    depth = 0
    while isinstance(declared, dict) and declared:
        declared = declared.get("properties", {}).get("child")
        depth += 1
    assert depth == 17
    circle = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}
    assert declared_schema(circle)["type"] == "OBJECT"


def test_schemas_that_all_refer_to_each_other_are_told_in_no_time() -> None:
    names = [f"S{number}" for number in range(10)]
    everything = {name: {"$ref": f"#/$defs/{name}"} for name in names}
    definitions = {name: {"type": "object", "properties": everything} for name in names}
    declared = declared_schema({"properties": everything, "$defs": definitions})
    assert json.dumps(declared).count('"type"') <= 2000
