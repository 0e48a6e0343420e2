"""The official client's helpers for chats: parsed answers, streams of events, raw responses."""

import json

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from gemma_serve.errors import OverloadedError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationStream,
    SampledLogprobs,
    TokenLogprob,
)
from tests.contract.test_openai_sdk import sdk
from tests.fakes import FakeGenerationClient, Step, answer, delta
from tests.openai_api.harness import MODEL

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


class City(BaseModel):
    name: str
    rivers: list[str]


PARIS = '{"name": "Paris", "rivers": ["Seine"]}'


async def test_parse_gives_an_object_of_the_schemas_class() -> None:
    fake = FakeGenerationClient(*answer(*PARIS))
    async with sdk(fake) as client:
        completion = await client.chat.completions.parse(
            model=MODEL, messages=HELLO, response_format=City
        )
    assert completion.choices[0].message.parsed == City(name="Paris", rivers=["Seine"])
    constraint = fake.requests[0].output_constraint
    assert constraint is not None
    assert json.loads(constraint.value)["required"] == ["name", "rivers"]


async def test_parse_raises_its_own_error_where_a_limit_cut_the_answer() -> None:
    script = answer(PARIS[:9], finish_reason=FinishReason.LENGTH)
    async with sdk(FakeGenerationClient(*script)) as client:
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=City)


async def test_parse_reads_the_arguments_of_a_call() -> None:
    call = f'{{"name": "City", "parameters": {PARIS}}}'
    async with sdk(FakeGenerationClient(*answer(call))) as client:
        completion = await client.chat.completions.parse(
            model=MODEL, messages=HELLO, tools=[openai.pydantic_function_tool(City)]
        )
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    (parsed,) = calls
    assert parsed.function.parsed_arguments == City(name="Paris", rivers=["Seine"])


class Rivers(BaseModel):
    """Look up rivers."""

    city: str


@pytest.mark.parametrize(
    ("text", "parsed", "calls"),
    [
        (PARIS, City(name="Paris", rivers=["Seine"]), []),
        ('{"name": "Rivers", "parameters": {"city": "Paris"}}', None, [Rivers(city="Paris")]),
    ],
)
async def test_parse_reads_the_format_or_the_call_that_was_made_instead(
    text: str, parsed: City | None, calls: list[Rivers]
) -> None:
    tools = [openai.pydantic_function_tool(Rivers)]
    async with sdk(FakeGenerationClient(*answer(*text))) as client:
        completion = await client.chat.completions.parse(
            model=MODEL, messages=HELLO, response_format=City, tools=tools
        )
        async with client.chat.completions.stream(
            model=MODEL, messages=HELLO, response_format=City, tools=tools
        ) as stream:
            streamed = await stream.get_final_completion()
    for message in (completion.choices[0].message, streamed.choices[0].message):
        assert message.parsed == parsed
        made = [call.function.parsed_arguments for call in message.tool_calls or ()]
        assert made == calls


async def test_stream_gives_events_of_content_as_it_grows() -> None:
    async with (
        sdk(FakeGenerationClient(*answer('{"name": "Paris", ', '"rivers": []}'))) as client,
        client.chat.completions.stream(
            model=MODEL,
            messages=HELLO,
            response_format=City,
            stream_options={"include_usage": True},
        ) as stream,
    ):
        events = [event async for event in stream]
        completion = await stream.get_final_completion()
    snapshots = [event.snapshot for event in events if event.type == "content.delta"]
    assert snapshots[-1] == '{"name": "Paris", "rivers": []}'
    (done,) = [event for event in events if event.type == "content.done"]
    assert done.parsed == City(name="Paris", rivers=[])
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 3


async def test_stream_gives_events_of_each_calls_arguments() -> None:
    call = f'{{"name": "City", "parameters": {PARIS}}}'
    text = f"[{call}, {call}]"
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    async with (
        sdk(FakeGenerationClient(*answer(*pieces))) as client,
        client.chat.completions.stream(
            model=MODEL, messages=HELLO, tools=[openai.pydantic_function_tool(City)]
        ) as stream,
    ):
        events = [event async for event in stream]
    deltas: dict[int, str] = {0: "", 1: ""}
    for event in events:
        if event.type == "tool_calls.function.arguments.delta":
            deltas[event.index] += event.arguments_delta
    assert deltas == {0: PARIS, 1: PARIS}
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name, event.arguments) for event in done] == [
        (0, "City", PARIS),
        (1, "City", PARIS),
    ]
    assert done[0].parsed_arguments == City(name="Paris", rivers=["Seine"])


async def test_stream_gives_events_of_logprobs() -> None:
    def told(text: str, finish_reason: FinishReason | None = None) -> Step:
        told = SampledLogprobs(TokenLogprob(5, -0.5, text.encode()), ())
        return [GenerationDelta(0, text, (5,), finish_reason, logprobs=(told,))]

    script = (told("Hel"), told("lo", FinishReason.STOP))
    async with (
        sdk(FakeGenerationClient(*script)) as client,
        client.chat.completions.stream(model=MODEL, messages=HELLO, logprobs=True) as stream,
    ):
        events = [event async for event in stream]
    deltas = [event for event in events if event.type == "logprobs.content.delta"]
    assert [[entry.token for entry in event.content] for event in deltas] == [["Hel"], ["lo"]]
    (done,) = [event for event in events if event.type == "logprobs.content.done"]
    assert [entry.token for entry in done.content] == ["Hel", "lo"]


async def test_stream_that_is_left_early_ends_its_request() -> None:
    fake = FakeGenerationClient(*answer("a", "b", "c"))
    async with sdk(fake) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
    assert len(fake.closed) == 1


async def test_raw_response_has_headers_and_the_same_body() -> None:
    async with sdk(FakeGenerationClient(*answer("Hi"))) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=HELLO, extra_headers={"X-Client-Request-Id": "mine-1"}
        )
    assert raw.status_code == 200
    assert raw.headers["x-request-id"] == "mine-1"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == "Hi"


async def test_raw_streamed_response_is_lines_of_events() -> None:
    async with (
        sdk(FakeGenerationClient(*answer("Hi"))) as client,
        client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=HELLO, stream=True
        ) as response,
    ):
        lines = [line async for line in response.iter_lines()]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [line[:6] for line in lines] == ["data: ", ""] * 4
    assert lines[-2] == "data: [DONE]"


async def test_client_comes_back_after_the_time_that_a_full_queue_asks_for() -> None:
    class BusyOnce(FakeGenerationClient):
        async def generate(self, request: GenerationRequest) -> GenerationStream:
            if not self.requests:
                self.requests.append(request)
                raise OverloadedError("The queue is full.", retry_after_s=0.01)
            return await super().generate(request)

    fake = BusyOnce([delta("Hi", FinishReason.STOP)])
    async with sdk(fake) as client:
        completion = await client.with_options(max_retries=1).chat.completions.create(
            model=MODEL, messages=HELLO
        )
    assert completion.choices[0].message.content == "Hi"
    assert len(fake.requests) == 2
