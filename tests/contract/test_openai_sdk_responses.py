"""Responses with the official client, against the whole application in one process."""

import json

import openai
import pytest
from openai.types.responses import FunctionToolParam, ResponseInputParam
from pydantic import BaseModel

from gemma_serve.generation import FinishReason
from gemma_serve.messages import Role, TextPart, ToolCall
from tests.contract.test_openai_sdk import sdk
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import MODEL, messages_of

CALL = '```json\n[{"name": "get_weather", "parameters": {"city": "Paris"}}]\n```'
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Sun or rain?",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}


async def test_loop_of_call_result_and_answer() -> None:
    history: ResponseInputParam = [{"role": "user", "content": "Weather in Paris?"}]
    async with sdk(FakeGenerationClient(*answer(CALL))) as client:
        first = await client.responses.create(model=MODEL, input=history, tools=[WEATHER])
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    assert first.output_text == ""

    history += [item.to_dict() for item in first.output]  # type: ignore[misc]  # as its users do
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"})
    fake = FakeGenerationClient(*answer("It is sunny."))
    async with sdk(fake) as client:
        second = await client.responses.create(model=MODEL, input=history, tools=[WEATHER])
    assert second.output_text == "It is sunny."
    _, called, result = messages_of(fake.requests[0])
    assert called.tool_calls == (ToolCall(call.call_id, "get_weather", '{"city": "Paris"}'),)
    assert (result.role, result.parts) == (Role.TOOL, (TextPart("Sunny"),))


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_sdks_own_accumulator_assembles_text_and_calls(size: int) -> None:
    text = f"Two.\n{CALL}"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    async with (
        sdk(FakeGenerationClient(*answer(*pieces))) as client,
        client.responses.stream(model=MODEL, input="Weather?", tools=[WEATHER]) as stream,
    ):
        snapshots = [
            event.snapshot
            async for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        response = await stream.get_final_response()
    message, call = response.output
    assert message.type == "message"
    assert response.output_text == "Two.\n"
    assert call.type == "function_call"
    assert call.arguments == snapshots[-1] == '{"city": "Paris"}'


class City(BaseModel):
    name: str


async def test_parse_gives_an_object_of_the_schemas_class() -> None:
    fake = FakeGenerationClient(*answer('{"name": ', '"Paris"}'))
    async with sdk(fake) as client:
        response = await client.responses.parse(model=MODEL, input="A city?", text_format=City)
        async with client.responses.stream(
            model=MODEL, input="A city?", text_format=City
        ) as stream:
            streamed = await stream.get_final_response()
    assert response.output_parsed == City(name="Paris")
    assert streamed.output_parsed == City(name="Paris")
    constraint = fake.requests[0].output_constraint
    assert constraint is not None
    assert json.loads(constraint.value)["required"] == ["name"]


async def test_parse_reads_the_arguments_of_calls() -> None:
    call = '{"name": "City", "parameters": {"name": "Paris"}}'
    async with sdk(FakeGenerationClient(*answer(call))) as client:
        response = await client.responses.parse(
            model=MODEL, input="A city?", tools=[openai.pydantic_function_tool(City)]
        )
    (item,) = response.output
    assert item.type == "function_call"
    assert item.parsed_arguments == City(name="Paris")


async def test_answer_cut_by_the_limit_is_incomplete() -> None:
    script = answer('{"name": "get_w', finish_reason=FinishReason.LENGTH)
    async with sdk(FakeGenerationClient(*script)) as client:
        response = await client.responses.create(
            model=MODEL, input="Hi", tools=[WEATHER], max_output_tokens=16
        )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == '{"name": "get_w'


async def test_input_of_a_stored_response_is_listed_and_referred_to() -> None:
    fake = FakeGenerationClient(*answer("Hi!"))
    async with sdk(fake) as client:
        first = await client.responses.create(
            model=MODEL,
            input=[
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Who?"},
            ],
        )
        items = [item async for item in client.responses.input_items.list(first.id, limit=2)]
        assert items[0].id is not None
        await client.responses.create(
            model=MODEL,
            input=[
                {"type": "item_reference", "id": items[0].id},
                {"type": "item_reference", "id": first.output[0].id or ""},
                {"role": "user", "content": "So?"},
            ],
        )
        with pytest.raises(openai.BadRequestError, match="synchronous"):
            await client.responses.cancel(first.id)
    assert [item.type for item in items] == ["message"] * 3
    texts = [message.parts for message in messages_of(fake.requests[1])]
    assert texts == [(TextPart("Who?"),), (TextPart("Hi!"),), (TextPart("So?"),)]


async def test_input_is_counted_without_an_answer() -> None:
    fake = FakeGenerationClient(*answer("Hi!"))
    async with sdk(fake) as client:
        first = await client.responses.create(model=MODEL, input="Hello")
        counted = await client.responses.input_tokens.count(
            model=MODEL, input="And?", previous_response_id=first.id, tools=[WEATHER]
        )
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.input_tokens.count(
                model=MODEL, input="And?", tools=[WEATHER, WEATHER]
            )
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", 1)
    assert caught.value.param == "tools[1].name"
    assert len(fake.requests) == 1


async def test_raw_response_has_the_request_id_and_streams_lines() -> None:
    async with sdk(FakeGenerationClient(*answer("Hi"))) as client:
        raw = await client.responses.with_raw_response.create(model=MODEL, input="Hi")
        async with client.responses.with_streaming_response.create(
            model=MODEL, input="Hi", stream=True
        ) as streamed:
            lines = [line async for line in streamed.iter_lines()]
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().output_text == "Hi"
    assert lines[0] == "event: response.created"
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
