"""Tools in requests, and calls in answers."""

import json
import logging
import re
from dataclasses import replace

import pytest
from httpx import Response

from gemma_serve.errors import OutputConstraintError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    OutputConstraint,
    SampledLogprobs,
    TokenLogprob,
)
from gemma_serve.messages import ToolDefinition, ToolOffer
from gemma_serve.openai_api.config import ToolPolicy
from gemma_serve.openai_api.response_schemas import ChatCompletionChunk
from tests.fakes import TEXT_MODEL, FakeGenerationClient, answer, delta
from tests.openai_api.harness import error_of, make_app, offer_of, post_chat

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TIME = {"type": "function", "function": {"name": "get_time"}}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Sun?", "parameters": CITY, "strict": True},
}
TOOLS = [TIME, WEATHER]
DEFINITIONS = (
    ToolDefinition("get_time"),
    ToolDefinition(
        "get_weather",
        "Sun?",
        '{"type": "object", "properties": {"city": {"type": "string"}}}',
    ),
)
CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def allowed(mode: str, *tools: object) -> dict[str, object]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


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


ANSWER = {"type": "object", "properties": {"sunny": {"type": "boolean"}}}
ANSWER_FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}


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


async def called(*texts: str, **fields: object) -> Response:
    """The answer to a request with ``TOOLS`` when the model writes ``texts``."""
    response = await post_chat(
        make_app(FakeGenerationClient(*answer(*texts))), **{"tools": TOOLS, **fields}
    )
    assert response.status_code == 200, response.text
    return response


def choices_of(response: Response) -> list[dict[str, object]]:
    """The one choice of every chunk, each checked against its documented model."""
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return [chunk["choices"][0] for chunk in chunks]


async def test_whole_answer_with_a_call_has_every_field_of_the_contract() -> None:
    (choice,) = (await called(CALL[:20], CALL[20:])).json()["choices"]
    call_id = choice["message"]["tool_calls"][0].pop("id")
    assert re.fullmatch(r"call_[0-9a-f]{24}", call_id)
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


async def test_text_beside_a_call_is_the_content() -> None:
    (choice,) = (await called("One moment. ", CALL)).json()["choices"]
    assert choice["message"]["content"] == "One moment. "
    assert len(choice["message"]["tool_calls"]) == 1


async def test_answer_without_a_call_has_no_key_for_calls() -> None:
    (choice,) = (await called("[1, ", "2]")).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("[1, 2]", "stop")
    assert "tool_calls" not in choice["message"]


async def test_stream_of_a_call_is_its_name_and_then_pieces_of_its_arguments() -> None:
    pieces = ["Wait.", ' {"name": "get_', 'weather", "parameters": {', '"city": "Paris"}', "}"]
    _, *choices, last = choices_of(await called(*pieces, stream=True))
    call_id = choices[2]["delta"]["tool_calls"][0].pop("id")  # type: ignore[index]  # JSON
    assert re.fullmatch(r"call_[0-9a-f]{24}", call_id)
    assert [choice["delta"] for choice in choices] == [
        {"content": "Wait."},
        {"content": " "},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"city": "Paris"}'}}]},
    ]
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


async def test_stream_that_begins_with_a_call_has_no_content_and_one_of_text_does() -> None:
    """Clients take an empty content for the start of a text."""
    for fields in ({}, {"tool_choice": "required"}, {"response_format": ANSWER_FORMAT}):
        role, call, *_ = choices_of(await called(CALL[:30], CALL[30:], stream=True, **fields))
        assert role["delta"] == {"role": "assistant", "content": None, "refusal": None}
        assert "tool_calls" in call["delta"]  # type: ignore[operator]  # JSON
    role, text, *_ = choices_of(await called("Sunny.", stream=True))
    assert role["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert text["delta"] == {"content": "Sunny."}


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_in_its_format_is_text_whatever_it_holds(stream: bool) -> None:
    text = f'{{"calls": [{CALL}]}}'
    fields = {"tools": TOOLS, "response_format": {"type": "json_object"}, "stream": stream}
    response = await post_chat(make_app(FakeGenerationClient(*answer(*text))), **fields)
    if stream:
        deltas = [choice["delta"] for choice in choices_of(response)]
        assert "".join(delta.get("content", "") for delta in deltas) == text  # type: ignore[attr-defined]  # JSON
    else:
        assert response.json()["choices"][0]["message"]["content"] == text


async def test_text_that_was_held_back_comes_before_the_finish_reason() -> None:
    _, *choices, last = choices_of(await called('{"name": "get_time"', stream=True))
    assert [choice["delta"] for choice in choices] == [{"content": '{"name": "get_time"'}]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_call_that_a_limit_cuts_off_ends_with_length(stream: bool) -> None:
    client = FakeGenerationClient(*answer(CALL[:-5], finish_reason=FinishReason.LENGTH))
    response = await post_chat(make_app(client), tools=TOOLS, stream=stream)
    choice = choices_of(response)[-1] if stream else response.json()["choices"][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("text", ["", "{", '{"name": "get_wea', '[{"name": "get_weather", '])
@pytest.mark.parametrize("stream", [False, True])
async def test_certain_call_that_a_limit_cuts_off_before_it_begins_is_no_text(
    text: str, stream: bool
) -> None:
    client = FakeGenerationClient(*answer(text, finish_reason=FinishReason.LENGTH))
    fields = {"tools": TOOLS, "tool_choice": "required", "stream": stream}
    response = await post_chat(make_app(client), **fields)
    if stream:
        _, *choices = choices_of(response)
        assert [(c["delta"], c["finish_reason"]) for c in choices] == [({}, "length")]
    else:
        (choice,) = response.json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
        assert "tool_calls" not in choice["message"]


async def test_only_one_call_without_parallel_calls() -> None:
    response = await called(f"[{CALL}, {CALL}]", parallel_tool_calls=False)
    (choice,) = response.json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


async def test_call_of_a_function_that_is_not_allowed_is_text() -> None:
    (choice,) = (await called(CALL, tool_choice=allowed("auto", TIME))).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_without_a_choice_of_tools_what_looks_like_a_call_is_text() -> None:
    (choice,) = (await called(CALL, tool_choice="none")).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_choices_call_apart() -> None:
    step = [
        delta(CALL, FinishReason.STOP),
        delta("Sunny.", FinishReason.STOP, index=1),
        delta(CALL[:9], index=2),
    ]
    client = FakeGenerationClient(step, [delta(CALL[9:], FinishReason.STOP, index=2)])
    response = await post_chat(make_app(client), tools=TOOLS, n=3)
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    ids = [choices[index]["message"]["tool_calls"][0]["id"] for index in (0, 2)]
    assert ids[0] != ids[1]


def spelled(*texts: str) -> list[list[GenerationDelta]]:
    """A step for each text, a token of which is a character, and one for the end of the turn."""
    steps = [
        [
            GenerationDelta(
                0,
                text,
                tuple(text.encode()),
                logprobs=tuple(
                    SampledLogprobs(TokenLogprob(i, -1.0, bytes([i])), ()) for i in text.encode()
                ),
            )
        ]
        for text in texts
    ]
    end = SampledLogprobs(TokenLogprob(1, -1.0, b""), ())
    return [*steps, [GenerationDelta(0, "", (1,), FinishReason.STOP, logprobs=(end,))]]


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_no_logprob_and_no_token_id_is_lost_while_text_is_held_back(size: int) -> None:
    text = f"Wait. {CALL} {{1}} [{CALL}]"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    app = make_app(FakeGenerationClient(*spelled(*pieces)))
    fields = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    (whole,) = (await post_chat(app, **fields)).json()["choices"]
    assert "".join(entry["token"] for entry in whole["logprobs"]["content"]) == text
    assert whole["token_ids"] == [*text.encode(), 1]
    streamed = choices_of(await post_chat(app, **fields, stream=True))
    entries = [e for c in streamed if c["logprobs"] for e in c["logprobs"]["content"]]  # type: ignore[index]  # JSON
    assert entries == whole["logprobs"]["content"]
    assert [i for c in streamed for i in c.get("token_ids") or ()] == whole["token_ids"]  # type: ignore[attr-defined]  # JSON
