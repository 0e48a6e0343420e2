"""Tools with the official client, against the whole application in one process."""

import json

import pytest
from openai.types.chat import (
    ChatCompletionMessageParam,
    ChatCompletionToolUnionParam,
)

from gemma_serve.messages import Role, TextPart, ToolCall
from gemma_serve.tool_calling.prompt import tool_prompt
from tests.contract.test_openai_sdk import sdk
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import MODEL, messages_of, offer_of

CALL = '```json\n[{"name": "get_weather", "parameters": {"city": "Paris"}}]\n```'
QUESTION: ChatCompletionMessageParam = {"role": "user", "content": "Weather in Paris?"}


def tool(name: str, description: str = "Sun or rain?") -> ChatCompletionToolUnionParam:
    parameters: dict[str, object] = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Its name"}},
        "required": ["city"],
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = tool("get_weather")


async def test_loop_of_call_result_and_answer() -> None:
    messages: list[ChatCompletionMessageParam] = [QUESTION]
    async with sdk(FakeGenerationClient(*answer(CALL))) as client:
        completion = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=[WEATHER]
        )
    (choice,) = completion.choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    messages.append(choice.message.to_dict())  # type: ignore[arg-type]  # as its users do
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 °C, sunny"})
    fake = FakeGenerationClient(*answer("It is sunny."))
    async with sdk(fake) as client:
        completion = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=[WEATHER]
        )
    assert completion.choices[0].message.content == "It is sunny."
    assert completion.choices[0].message.tool_calls is None
    _, called, result = messages_of(fake.requests[0])
    assert called.tool_calls == (ToolCall(call.id, "get_weather", '{"city": "Paris"}'),)
    assert (result.role, result.tool_call_id) == (Role.TOOL, call.id)
    assert result.parts == (TextPart("18 °C, sunny"),)


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_sdks_own_accumulator_assembles_the_calls(size: int) -> None:
    text = 'Two.\n[get_weather(city="Paris"), {"name": "get_time", "parameters": {"city": "Rome"}}]'
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    async with (
        sdk(FakeGenerationClient(*answer(*pieces))) as client,
        client.chat.completions.stream(
            model=MODEL, messages=[QUESTION], tools=[WEATHER, tool("get_time")]
        ) as stream,
    ):
        completion = await stream.get_final_completion()
    (choice,) = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("Two.\n", "tool_calls")
    assert choice.message.tool_calls is not None
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("get_weather", '{"city": "Paris"}'),
        ("get_time", '{"city": "Rome"}'),
    ]


async def test_raw_stream_has_an_index_on_every_delta_and_each_id_once() -> None:
    pieces = ['{"name": "get_weather", "parameters": {"ci', 'ty": "Par', 'is"}}']
    async with sdk(FakeGenerationClient(*answer(*pieces))) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[QUESTION], tools=[WEATHER], stream=True
        )
        deltas = [chunk.choices[0].delta async for chunk in stream]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 0, 0, 0]
    assert [call.id is None for call in calls] == [False, True, True, True]
    arguments = [call.function.arguments for call in calls if call.function is not None]
    assert arguments == ["", '{"ci', 'ty": "Par', 'is"}']


async def test_named_function_and_parallel_calls_reach_the_engine_as_a_constraint() -> None:
    fake = FakeGenerationClient(*answer('{"name": "get_weather", "parameters": {"city": "Paris"}}'))
    async with sdk(fake) as client:
        completion = await client.chat.completions.create(
            model=MODEL,
            messages=[QUESTION],
            tools=[tool("get_time"), WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            parallel_tool_calls=False,
        )
    assert completion.choices[0].finish_reason == "tool_calls"
    constraint = fake.requests[0].output_constraint
    assert constraint is not None
    assert json.loads(constraint.value)["properties"]["name"] == {"const": "get_weather"}


async def test_three_dozen_tools_are_the_same_start_of_every_prompt() -> None:
    tools = [tool(f"builtin_tool_{number}", "What it does. " * 30) for number in range(36)]
    fake = FakeGenerationClient(*answer("Hello."))
    chats: list[list[ChatCompletionMessageParam]] = [
        [QUESTION],
        [QUESTION, {"role": "assistant", "content": ""}, QUESTION],
    ]
    async with sdk(fake) as client:
        for messages in chats:
            completion = await client.chat.completions.create(
                model=MODEL, messages=messages, tools=tools
            )
            assert completion.choices[0].message.content == "Hello."
    first, second = [offer_of(request) for request in fake.requests]
    assert first is not None
    assert second is not None
    assert tool_prompt(first) == tool_prompt(second)
    assert tool_prompt(first).count('{"name": "builtin_tool_') == 36
