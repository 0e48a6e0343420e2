"""The official client against the whole application, in one process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2  # the openai package's HTTP client
import openai
import pytest
from openai import AsyncOpenAI

from gemma_serve.errors import (
    ContextLengthError,
    GenerationError,
    OverloadedError,
    UnavailableError,
)
from gemma_serve.generation import FinishReason
from tests.fakes import VISION_MODEL, FakeGenerationClient, FakeImageLoader, answer, delta, image_of
from tests.openai_api.harness import MODEL, make_app, messages_of


@asynccontextmanager
async def sdk(
    client: FakeGenerationClient, *, api_key: str = "sk-one"
) -> AsyncIterator[AsyncOpenAI]:
    app = make_app(client, FakeImageLoader(), api_keys=("sk-one",))
    transport = httpx2.ASGITransport(app=app)
    async with AsyncOpenAI(
        base_url="http://server/v1",
        api_key=api_key,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as openai_client:
        yield openai_client


async def test_whole_answer() -> None:
    async with sdk(FakeGenerationClient(*answer("Hel", "lo"))) as client:
        completion = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
    assert completion.choices[0].message.content == "Hello"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 10
    assert completion._request_id is not None
    assert completion._request_id.startswith("req_")


async def test_stream_joins_to_the_whole_answer() -> None:
    async with sdk(FakeGenerationClient(*answer("Hel", "lo"))) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_sdks_own_accumulator_assembles_the_same_completion() -> None:
    step = [delta("a"), delta("x", FinishReason.STOP, index=1), delta("b", FinishReason.STOP)]
    async with (
        sdk(FakeGenerationClient(step)) as client,
        client.chat.completions.stream(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], n=2
        ) as stream,
    ):
        completion = await stream.get_final_completion()
    assert [
        (choice.index, choice.message.content, choice.finish_reason)
        for choice in completion.choices
    ] == [(0, "ab", "stop"), (1, "x", "stop")]


async def test_image_reaches_the_model() -> None:
    fake = FakeGenerationClient(*answer("A cat."), description=VISION_MODEL)
    async with sdk(fake) as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://a/cat.png"}}],
                }
            ],
        )
    assert messages_of(fake.requests[0])[0].parts == (image_of("https://a/cat.png"),)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ContextLengthError.of(prompt_tokens=9, max_model_len=8), openai.BadRequestError),
        (OverloadedError("The queue is full."), openai.RateLimitError),
        (UnavailableError("The model is loading."), openai.InternalServerError),
        (RuntimeError("unexpected"), openai.InternalServerError),
    ],
)
async def test_error_at_admission_is_the_sdks_own_class(
    error: Exception, expected: type[openai.APIStatusError], stream: bool
) -> None:
    async with sdk(FakeGenerationClient(generate_error=error)) as client:
        with pytest.raises(expected):
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=stream
            )


async def test_context_length_is_told_by_its_code() -> None:
    error = ContextLengthError.of(prompt_tokens=9, max_model_len=8)
    async with sdk(FakeGenerationClient(generate_error=error)) as client:
        with pytest.raises(openai.BadRequestError, match="maximum context length is 8") as caught:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}]
            )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_error_in_the_middle_of_a_stream_is_raised_after_the_text() -> None:
    fake = FakeGenerationClient([delta("Hel")], GenerationError("The engine failed."))
    async with sdk(fake) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match=r"The engine failed\."):
            await anext(stream)
    assert texts == ["", "Hel"]


async def test_wrong_key() -> None:
    async with sdk(FakeGenerationClient(), api_key="sk-two") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_wrong_model() -> None:
    async with sdk(FakeGenerationClient()) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "Hello"}]
            )
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_wrong_value() -> None:
    async with sdk(FakeGenerationClient()) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], temperature=3
            )
    assert caught.value.param == "temperature"


async def test_models() -> None:
    async with sdk(FakeGenerationClient()) as client:
        models = [model.id async for model in client.models.list()]
        model = await client.models.retrieve(MODEL)
    assert models == [MODEL]
    assert model.to_dict()["max_model_len"] == 4096


async def test_completions_whole_and_streamed() -> None:
    async with sdk(FakeGenerationClient(*answer("Hel", "lo"))) as client:
        whole = await client.completions.create(model=MODEL, prompt=["Hello", "Hi"], max_tokens=5)
        stream = await client.completions.create(
            model=MODEL, prompt="Hello", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, "Hello"), (1, "Hello")]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_response_is_made_continued_read_and_deleted() -> None:
    async with sdk(FakeGenerationClient(*answer("Hel", "lo"))) as client:
        first = await client.responses.create(model=MODEL, input="Hi", instructions="Be kind.")
        second = await client.responses.create(
            model=MODEL, input="And?", previous_response_id=first.id
        )
        read = await client.responses.retrieve(second.id)
        await client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(second.id)
    assert (first.output_text, first.status) == ("Hello", "completed")
    assert read == second
    assert read.previous_response_id == first.id


async def test_sdks_own_accumulator_assembles_the_same_response() -> None:
    async with (
        sdk(FakeGenerationClient(*answer("Hel", "lo"))) as client,
        client.responses.stream(model=MODEL, input="Hi") as stream,
    ):
        texts = [
            event.delta async for event in stream if event.type == "response.output_text.delta"
        ]
        response = await stream.get_final_response()
    assert texts == ["Hel", "lo"]
    assert (response.output_text, response.status) == ("Hello", "completed")
    assert response.usage is not None
    assert response.usage.total_tokens == 10
