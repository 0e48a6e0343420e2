"""Tools in requests."""

import json
import logging
from dataclasses import replace

import pytest

from gemma_serve.errors import OutputConstraintError
from gemma_serve.generation import (
    GenerationRequest,
    OutputConstraint,
)
from gemma_serve.messages import ToolOffer
from gemma_serve.openai_api.config import ToolPolicy
from tests.fakes import TEXT_MODEL, FakeGenerationClient, answer
from tests.openai_api.harness import error_of, make_app, offer_of, post_chat
from tests.openai_api.tools import (
    ANSWER,
    ANSWER_FORMAT,
    CALL,
    DEFINITIONS,
    NAMED,
    TIME,
    TOOLS,
    WEATHER,
    allowed,
)


async def requested(
    policy: ToolPolicy | None = None, *, calls_tools: bool = True, **fields: object
) -> GenerationRequest:
    """What reaches the engine from a request with ``TOOLS`` and ``fields``."""
    description = replace(TEXT_MODEL, calls_tools=calls_tools)
    client = FakeGenerationClient(*answer(), description=description)
    response = await post_chat(make_app(client, tools=policy), **{"tools": TOOLS, **fields})
    assert response.status_code == 200, response.text
    return client.requests[0]


def schema_of(request: GenerationRequest) -> dict[str, object]:
    """The JSON schema that the answer to ``request`` is held to."""
    constraint = request.output_constraint
    assert isinstance(constraint, OutputConstraint)
    assert constraint.kind == "json_schema"
    schema: dict[str, object] = json.loads(constraint.value)
    return schema


def functions_of(schema: dict[str, object]) -> list[str]:
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    return list(definitions)


@pytest.mark.parametrize("choice", ["auto", None])
async def test_tools_are_offered(choice: str | None) -> None:
    request = await requested(tool_choice=choice)
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)
    assert request.output_constraint is None


async def test_no_tools_are_no_offer() -> None:
    assert offer_of(await requested(tools=[])) is None
    assert offer_of(await requested(tools=None)) is None
    assert offer_of(await requested(tool_choice="none")) is None


async def test_required_call_is_constrained_to_the_tools() -> None:
    request = await requested(tool_choice="required")
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)
    schema = schema_of(request)
    assert functions_of(schema) == ["get_time", "get_weather"]
    assert isinstance(schema["anyOf"], list)
    assert schema["anyOf"][1]["type"] == "array"


async def test_required_call_is_one_without_parallel_calls() -> None:
    schema = schema_of(await requested(tool_choice="required", parallel_tool_calls=False))
    assert isinstance(schema["anyOf"], list)
    assert [call["properties"]["name"] for call in schema["anyOf"]] == [
        {"const": "get_time"},
        {"const": "get_weather"},
    ]


async def test_named_function_is_the_only_one_that_can_be_called() -> None:
    request = await requested(tool_choice=NAMED)
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)
    assert functions_of(schema_of(request)) == ["get_weather"]


async def test_allowed_tools_narrow_the_offer_and_leave_its_text_as_it_is() -> None:
    request = await requested(tool_choice=allowed("auto", WEATHER))
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS, allowed=("get_weather",))
    assert request.output_constraint is None


async def test_all_tools_allowed_are_the_plain_offer() -> None:
    request = await requested(tool_choice=allowed("auto", WEATHER, TIME))
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)


async def test_allowed_tools_may_be_required() -> None:
    request = await requested(tool_choice=allowed("required", WEATHER))
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)
    assert functions_of(schema_of(request)) == ["get_weather"]


@pytest.mark.parametrize("choice", ["required", NAMED, allowed("required", TIME)])
async def test_call_that_must_be_made_takes_no_other_format(choice: object) -> None:
    client = FakeGenerationClient(*answer())
    response = await post_chat(make_app(client), tools=TOOLS, tool_choice=choice, guided_regex="a+")
    assert (response.status_code, error_of(response)["param"]) == (400, "guided_regex")
    assert client.requests == []


@pytest.mark.parametrize("choice", ["required", NAMED, allowed("required", TIME)])
@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}},
    ],
)
async def test_format_of_the_text_says_nothing_of_a_call_that_must_be_made(
    choice: object, wanted: object
) -> None:
    """instructor's mode RESPONSES_TOOLS sends both."""
    plain = await requested(tool_choice=choice)
    formatted = await requested(tool_choice=choice, response_format=wanted)
    assert formatted.output_constraint == plain.output_constraint


async def test_format_of_another_server_is_obeyed_by_calls_too() -> None:
    request = await requested(format="json")
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)
    assert request.output_constraint == OutputConstraint(kind="json_object", value="")


@pytest.mark.parametrize(
    ("place", "param"),
    [
        ("$defs.get_weather.properties.city", "tools[1].function.parameters.properties.city"),
        ("$defs.get_weather", "tools[1].function.parameters"),
        ("anyOf[0]", "tools"),
        (None, "tools"),
    ],
)
async def test_parameters_that_cannot_be_enforced_are_an_error_of_their_tool(
    place: str | None, param: str
) -> None:
    client = FakeGenerationClient(generate_error=OutputConstraintError("No.", param=place))
    response = await post_chat(make_app(client), tools=TOOLS, tool_choice="required")
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("response_format", "text"),
    [
        (ANSWER_FORMAT, ANSWER),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": json.dumps(ANSWER)}, ANSWER),
    ],
)
async def test_format_beside_tools_is_one_of_text_and_leaves_calls_possible(
    response_format: object, text: object
) -> None:
    """The format once won, and no call could be made."""
    request = await requested(response_format=response_format)
    schema = schema_of(request)
    required = schema_of(await requested(tool_choice="required"))
    calls = {"anyOf": required["anyOf"]}
    assert schema["anyOf"] == [{"$ref": "#/$defs/$text"}, calls]
    assert schema["$defs"] == {"$text": text, **required["$defs"]}  # type: ignore[dict-item]  # JSON
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS, answer_schema=json.dumps(text))


async def test_format_leaves_only_calls_possible_that_tools_allow() -> None:
    one = await requested(response_format=ANSWER_FORMAT, parallel_tool_calls=False)
    assert functions_of(schema_of(one)) == ["$text", "get_time", "get_weather"]
    assert '"array"' not in json.dumps(schema_of(one)["anyOf"])
    few = await requested(response_format=ANSWER_FORMAT, tool_choice=allowed("auto", WEATHER))
    assert functions_of(schema_of(few)) == ["$text", "get_weather"]
    assert '"array"' in json.dumps(schema_of(few)["anyOf"])


async def test_format_is_all_there_is_where_no_call_can_be_made() -> None:
    for request in (
        await requested(response_format=ANSWER_FORMAT, tool_choice="none"),
        await requested(response_format=ANSWER_FORMAT, tools=[]),
        await requested(response_format=ANSWER_FORMAT, calls_tools=False),
    ):
        assert schema_of(request) == ANSWER


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[1]",
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        *('{"a":' * n + "1" + "}" * n for n in (300, 5000)),
    ],
)
async def test_text_that_is_no_schema_is_left_for_the_compiler_to_refuse(schema: str) -> None:
    request = await requested(response_format={"type": "json_object", "schema": schema})
    assert request.output_constraint == OutputConstraint(kind="json_schema", value=schema)
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)


@pytest.mark.parametrize(
    ("fields", "place", "param"),
    [
        ({}, "$defs.$text.properties.a", "response_format.json_schema.schema.properties.a"),
        ({}, "$defs.$text.$defs.A", "response_format.json_schema.schema.$defs.A"),
        ({}, None, "response_format.json_schema.schema"),
        ({}, "$defs.get_weather.properties.city", "tools[1].function.parameters.properties.city"),
        (
            {"tool_choice": "required"},
            "$defs.get_weather.properties.city",
            "tools[1].function.parameters.properties.city",
        ),
        (
            {"tool_choice": "none"},
            "properties.a",
            "response_format.json_schema.schema.properties.a",
        ),
    ],
)
async def test_what_cannot_be_enforced_is_an_error_of_the_format_or_of_the_function(
    fields: dict[str, object], place: str | None, param: str
) -> None:
    error = OutputConstraintError("it is odd", param=place, code="invalid_value")
    app = make_app(FakeGenerationClient(generate_error=error))
    response = await post_chat(app, tools=TOOLS, response_format=ANSWER_FORMAT, **fields)
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["message"]) == (param, "it is odd")


async def test_form_of_the_prompt_is_a_setting() -> None:
    client = FakeGenerationClient(*answer())
    await post_chat(make_app(client, tool_form="pythonic"), tools=TOOLS)
    assert offer_of(client.requests[0]) == ToolOffer(definitions=DEFINITIONS, form="pythonic")


async def test_small_model_is_not_told_of_tools_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "gemma_serve")
    description = replace(TEXT_MODEL, calls_tools=False)
    client = FakeGenerationClient(*answer(CALL), description=description)
    app = make_app(client)
    for _ in range(2):
        message = (await post_chat(app, tools=TOOLS)).json()["choices"][0]["message"]
        assert message["content"] == CALL
    assert [offer_of(request) for request in client.requests] == [None, None]
    (line,) = caplog.messages
    assert "answers in text to requests with tools" in line


async def test_small_model_can_be_made_to_call() -> None:
    request = await requested(calls_tools=False, tool_choice="required")
    assert offer_of(request) == ToolOffer(definitions=DEFINITIONS)
    assert functions_of(schema_of(request)) == ["get_time", "get_weather"]


async def test_setting_decides_over_the_models_size() -> None:
    assert offer_of(await requested("prompt", calls_tools=False)) is not None
    assert offer_of(await requested("ignore", calls_tools=True)) is None


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
async def test_rejected_tools_are_a_400_that_names_them(choice: object) -> None:
    app = make_app(FakeGenerationClient(*answer()), tools="reject")
    response = await post_chat(app, tools=TOOLS, tool_choice=choice)
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["code"]) == (
        "tools",
        "unsupported_value",
    )
    assert (await post_chat(app, tools=TOOLS, tool_choice="none")).status_code == 200
    assert (await post_chat(app, tools=[])).status_code == 200
