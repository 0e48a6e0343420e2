"""Functions in responses: told to the model, called, answered and called again."""

import json
from dataclasses import replace
from typing import Any

import pytest

from gemma_serve.errors import GenerationError, OutputConstraintError
from gemma_serve.generation import FinishReason
from gemma_serve.messages import ChatMessage, Role, TextPart, ToolCall, ToolDefinition
from tests.fakes import TEXT_MODEL, FakeGenerationClient, answer, delta
from tests.openai_api.harness import error_of, make_app, messages_of, offer_of
from tests.openai_api.responses.harness import Json, events_of, post, requested, said

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Sun or rain?",
    "parameters": PARAMETERS,
    "strict": True,
}
TIME = {"type": "function", "name": "get_time"}
ANSWER = 'Let me see.\n[{"name": "get_weather", "parameters": {"city": "Rome"}}, get_time()] Done.'


def shown(item: Json) -> tuple[str, str, str]:
    """What an item says or calls, and how it ended."""
    if item["type"] == "message":
        return "message", item["content"][0]["text"], item["status"]
    return item["name"], item["arguments"], item["status"]


async def test_model_is_told_of_the_functions() -> None:
    offer = offer_of(await requested(tools=[WEATHER, TIME]))
    assert offer is not None
    assert offer.definitions == (
        ToolDefinition("get_weather", "Sun or rain?", json.dumps(PARAMETERS)),
        ToolDefinition("get_time"),
    )
    assert offer.allowed is None


async def test_output_has_text_and_calls_in_their_order() -> None:
    response = await post(make_app(FakeGenerationClient(*answer(ANSWER))), tools=[WEATHER, TIME])
    body = response.json()
    assert [shown(item) for item in body["output"]] == [
        ("message", "Let me see.\n", "completed"),
        ("get_weather", '{"city": "Rome"}', "completed"),
        ("get_time", "{}", "completed"),
        ("message", " Done.", "completed"),
    ]
    assert (body["status"], body["tool_choice"]) == ("completed", "auto")
    assert body["tools"] == [
        WEATHER,
        {**TIME, "description": None, "parameters": None, "strict": None},
    ]
    _, call, other, _ = body["output"]
    assert sorted(call) == ["arguments", "call_id", "id", "name", "status", "type"]
    assert call["id"].startswith("fc_")
    assert call["call_id"].startswith("call_")
    assert call["call_id"] != other["call_id"]


async def test_stream_has_the_events_of_each_item_before_those_of_the_next() -> None:
    pieces = ["Yes. ", '{"name": "get_weather", "parameters": {"ci', 'ty": "Rome', '"}}']
    client = FakeGenerationClient(*answer(*pieces))
    events = events_of(await post(make_app(client), tools=[WEATHER], stream=True))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.get("output_index") for event in events] == [None] * 2 + [0] * 6 + [1] * 6 + [
        None
    ]
    message, call = events[-1]["response"]["output"]
    assert events[7]["item"] == message
    assert events[8]["item"] == {**call, "arguments": "", "status": "in_progress"}
    assert [event["delta"] for event in events[9:12]] == ['{"ci', 'ty": "Rome', '"}']
    done = {"item_id": call["id"], "output_index": 1, "sequence_number": 12}
    assert events[12] == {
        **done,
        "type": "response.function_call_arguments.done",
        "name": "get_weather",
        "arguments": '{"city": "Rome"}',
    }
    assert events[13]["item"] == call


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
async def test_streamed_items_are_those_of_the_whole_in_every_split(size: int) -> None:
    pieces = [ANSWER[start : start + size] for start in range(0, len(ANSWER), size)]
    client = FakeGenerationClient(*answer(*pieces))
    events = events_of(await post(make_app(client), tools=[WEATHER, TIME], stream=True))
    output = events[-1]["response"]["output"]
    assert [shown(item)[:2] for item in output] == [
        ("message", "Let me see.\n"),
        ("get_weather", '{"city": "Rome"}'),
        ("get_time", "{}"),
        ("message", " Done."),
    ]
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == output
    joined: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            index = event["output_index"]
            joined[index] = joined.get(index, "") + event["delta"]
    assert [joined[index] for index in range(4)] == [shown(item)[1] for item in output]


async def test_answer_that_is_cut_in_a_call_leaves_the_call_incomplete() -> None:
    cut = answer('{"name": "get_weather", "parameters": {"ci', finish_reason=FinishReason.LENGTH)
    body = (await post(make_app(FakeGenerationClient(*cut)), tools=[WEATHER])).json()
    assert [shown(item) for item in body["output"]] == [("get_weather", '{"ci', "incomplete")]
    assert (body["status"], body["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )


async def test_certain_call_that_is_cut_before_it_begins_leaves_an_empty_message() -> None:
    cut = answer('{"name": "get_w', finish_reason=FinishReason.LENGTH)
    app = make_app(FakeGenerationClient(*cut))
    body = (await post(app, tools=[WEATHER], tool_choice="required")).json()
    assert [shown(item) for item in body["output"]] == [("message", "", "incomplete")]


async def test_failure_in_a_call_leaves_the_call_incomplete() -> None:
    text = '{"name": "get_weather", "parameters": {"ci'
    client = FakeGenerationClient([delta(text)], GenerationError("The engine failed."))
    events = events_of(await post(make_app(client), tools=[WEATHER], stream=True))
    assert events[-1]["type"] == "response.failed"
    output = events[-1]["response"]["output"]
    assert [shown(item) for item in output] == [("get_weather", '{"ci', "incomplete")]


async def test_calls_and_their_results_go_back_to_the_model() -> None:
    request = await requested(
        [
            {"role": "user", "content": "Weather and time in Rome?"},
            {"type": "message", "role": "assistant", "content": "Let me see.\n"},
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "c1",
                "name": "get_weather",
                "arguments": '{"city": "Rome"}',
                "status": "completed",
            },
            {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "c1",
                "output": [{"type": "input_text", "text": "Sun"}],
            },
            {"type": "function_call_output", "call_id": "c2", "output": "12:00"},
        ],
        tools=[WEATHER, TIME],
    )
    calls = (ToolCall("c1", "get_weather", '{"city": "Rome"}'), ToolCall("c2", "get_time", "{}"))
    assert messages_of(request)[1:] == (
        ChatMessage(Role.ASSISTANT, (TextPart("Let me see.\n"),), tool_calls=calls),
        ChatMessage(Role.TOOL, (TextPart("Sun"),), tool_call_id="c1"),
        ChatMessage(Role.TOOL, (TextPart("12:00"),), tool_call_id="c2"),
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_stored_calls_are_continued_with_their_results(stream: bool) -> None:
    client = FakeGenerationClient(*answer(ANSWER))
    app = make_app(client)
    first = await post(app, "Hello", tools=[WEATHER, TIME], stream=stream)
    made = events_of(first)[-1]["response"] if stream else first.json()
    call_ids = [item["call_id"] for item in made["output"] if item["type"] == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": call_id, "output": "Sun"}
        for call_id in call_ids
    ]
    await post(app, results, previous_response_id=made["id"])
    calls = (
        ToolCall(call_ids[0], "get_weather", '{"city": "Rome"}'),
        ToolCall(call_ids[1], "get_time", "{}"),
    )
    assert messages_of(client.requests[1]) == (
        said(Role.USER, "Hello"),
        ChatMessage(Role.ASSISTANT, (TextPart("Let me see.\n"),), tool_calls=calls),
        said(Role.ASSISTANT, " Done."),
        *(ChatMessage(Role.TOOL, (TextPart("Sun"),), tool_call_id=i) for i in call_ids),
    )


NAMED = {"type": "function", "name": "get_time"}
NAMED_WEATHER = {"type": "function", "name": "get_weather"}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["get_weather", "get_time"]),
        (NAMED, ["get_time"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [NAMED]}, ["get_time"]),
    ],
)
async def test_call_that_must_be_made_is_a_constraint_and_is_told_again(
    choice: object, names: list[str]
) -> None:
    client = FakeGenerationClient(*answer('{"name": "get_time", "parameters": {}}'))
    body = (await post(make_app(client), tools=[WEATHER, TIME], tool_choice=choice)).json()
    assert body["tool_choice"] == choice
    assert [shown(item) for item in body["output"]] == [("get_time", "{}", "completed")]
    constraint = client.requests[0].output_constraint
    assert constraint is not None
    assert list(json.loads(constraint.value)["$defs"]) == names


async def test_format_of_the_text_says_nothing_of_a_call_that_must_be_made() -> None:
    text = {"format": {"type": "json_object"}}
    request = await requested(tools=[WEATHER], tool_choice=NAMED_WEATHER, text=text)
    assert request.output_constraint is not None
    assert request.output_constraint.kind == "json_schema"


async def test_some_functions_may_be_called() -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}
    request = await requested(tools=[WEATHER, TIME], tool_choice=choice)
    offer = offer_of(request)
    assert offer is not None
    assert offer.allowed == ("get_time",)
    assert request.output_constraint is None


async def test_model_that_must_not_call_is_not_told_of_functions() -> None:
    client = FakeGenerationClient(*answer(ANSWER))
    body = (await post(make_app(client), tools=[WEATHER], tool_choice="none")).json()
    assert offer_of(client.requests[0]) is None
    assert [shown(item) for item in body["output"]] == [("message", ANSWER, "completed")]
    assert body["tool_choice"] == "none"


async def test_at_most_one_call_without_parallel_calls() -> None:
    client = FakeGenerationClient(*answer(ANSWER))
    body = (await post(make_app(client), tools=[WEATHER, TIME], parallel_tool_calls=False)).json()
    assert body["parallel_tool_calls"] is False
    assert [item["type"] for item in body["output"]] == ["message", "function_call", "message"]


async def test_small_model_answers_in_text() -> None:
    description = replace(TEXT_MODEL, calls_tools=False)
    client = FakeGenerationClient(*answer(ANSWER), description=description)
    body = (await post(make_app(client), tools=[WEATHER])).json()
    assert offer_of(client.requests[0]) is None
    assert [item["type"] for item in body["output"]] == ["message"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [TIME, TIME]}, "tools[1].name", "invalid_value"),
        (
            {"tools": [{**TIME, "parameters": {"properties": {"a": {"type": "x"}}}}]},
            "tools[0].parameters.properties.a.type",
            "invalid_value",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [TIME], "tool_choice": "maybe"}, "tool_choice", "unsupported_value"),
        (
            {"tools": [TIME], "tool_choice": {"type": "web_search"}},
            "tool_choice",
            "unsupported_value",
        ),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice.name",
            "invalid_value",
        ),
        (
            {
                "tools": [TIME],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "x"}],
                },
            },
            "tool_choice.tools[0].name",
            "invalid_value",
        ),
        ({"tools": [TIME], "tool_choice": "required", "regex": "a"}, "regex", "invalid_value"),
    ],
)
async def test_mistake_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str, code: str
) -> None:
    client = FakeGenerationClient(*answer())
    response = await post(make_app(client), **fields)
    assert response.status_code == 400, response.text
    assert (error_of(response)["param"], error_of(response)["code"]) == (param, code)
    assert client.requests == []


async def test_parameters_that_cannot_be_enforced_are_told_by_their_place() -> None:
    error = OutputConstraintError("No.", param="$defs.get_time.properties.a")
    client = FakeGenerationClient(generate_error=error)
    response = await post(make_app(client), tools=[WEATHER, TIME], tool_choice="required")
    assert error_of(response)["param"] == "tools[1].parameters.properties.a"


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('{"calls": [{"name": "get_time", "parameters": {}}]}', ["message"]),
        ('{"name": "get_time", "parameters": {}}', ["function_call"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_answer_beside_tools_has_its_format_or_is_calls(
    text: str, items: list[str], stream: bool
) -> None:
    client = FakeGenerationClient(*answer(*text))
    fields = {"tools": [TIME], "text": {"format": {"type": "json_object"}}, "stream": stream}
    response = await post(make_app(client), **fields)
    output = events_of(response)[-1]["response"]["output"] if stream else response.json()["output"]
    assert [item["type"] for item in output] == items


async def test_format_that_cannot_be_enforced_beside_tools_is_told_by_its_place() -> None:
    error = OutputConstraintError("No.", param="$defs.$text.properties.a")
    wanted = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    response = await post(
        make_app(FakeGenerationClient(generate_error=error)), tools=[TIME], text={"format": wanted}
    )
    assert error_of(response)["param"] == "text.format.schema.properties.a"
