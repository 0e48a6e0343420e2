"""What goes wrong behind the HTTP side reaches those whom it concerns, and nobody else."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from gemma_serve.engine.async_engine import AsyncEngine
from gemma_serve.engine.sequence import Sequence
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.generation import ModelDescription, SamplingParams
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig
from tests.engine.builders import ScriptedRunner, make_block_manager, make_engine
from tests.openai_api.harness import MODEL, error_of, post_chat
from tests.structured_output.vocabularies import make_compiler
from tests.tiny import tiny_tokenizer

MAX_MODEL_LEN = 200
TOKENIZER = tiny_tokenizer()
POISON = TOKENIZER("!", add_special_tokens=False).input_ids[0]


def answer_or_fail(sequence: Sequence) -> int:
    """Fails at the third token of whoever wrote an exclamation mark, and says ``ok`` to others."""
    num_tokens = len(sequence.token_ids) - len(sequence.prompt.token_ids)
    if num_tokens == 2 and POISON in sequence.prompt.token_ids:
        raise RuntimeError("CUDA error: device-side assert triggered at 0xdeadbeef")
    return b"ok\x01"[num_tokens]


@pytest.fixture
def app() -> Iterator[FastAPI]:
    """The HTTP side before an engine that computes one request at a time."""
    blocks = make_block_manager(num_blocks=100)
    engine = AsyncEngine(
        lambda: make_engine(
            ScriptedRunner(answer_or_fail),
            block_manager=blocks,
            max_num_seqs=1,
            prefill_chunk_size=64,
            max_model_len=MAX_MODEL_LEN,
        ),
        max_unfinished_sequences=3,
    )
    prompts = PromptBuilder(
        TOKENIZER, vision=None, image_token_id=None, max_model_len=MAX_MODEL_LEN
    )
    description = ModelDescription(
        max_model_len=MAX_MODEL_LEN, vocab_size=256, default_sampling=SamplingParams(), vision=None
    )
    generator = GemmaGenerator(prompts, engine, description, make_compiler())
    yield build_app(generator, ApiConfig(model_name=MODEL))
    assert blocks.num_free_blocks == blocks.num_blocks
    generator.close()


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_failing_step_is_a_500_for_its_own_request_and_the_next_one_is_answered(
    app: FastAPI,
) -> None:
    failed, answered = await asyncio.gather(
        post_chat(app, messages=say("!")), post_chat(app, messages=say("hello"))
    )
    assert failed.status_code == 500
    assert error_of(failed) == {
        "message": "The model failed while it worked on this request. Please try again.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert answered.json()["choices"][0]["message"]["content"] == "ok"


async def test_failing_step_in_a_stream_is_its_last_event(app: FastAPI) -> None:
    response = await post_chat(app, messages=say("!"), stream=True)
    *chunks, error, done = [line for line in response.text.split("\n\n") if line]
    texts = [json.loads(c[6:])["choices"][0]["delta"].get("content", "") for c in chunks]
    assert "".join(texts) == "ok"
    assert json.loads(error[6:])["error"]["type"] == "server_error"
    assert "0xdeadbeef" not in response.text
    assert done == "data: [DONE]"
    assert (await post_chat(app, messages=say("hello"))).status_code == 200


async def test_prompt_beyond_the_context_is_a_400_with_both_numbers(app: FastAPI) -> None:
    response = await post_chat(app, messages=say("x" * MAX_MODEL_LEN))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(error["message"]).startswith(
        "This model's maximum context length is 200 tokens, but the prompt has 216 tokens"
    )


async def test_more_than_fits_is_queued_and_then_a_429_that_says_when_to_come_back(
    app: FastAPI,
) -> None:
    responses = await asyncio.gather(*(post_chat(app, messages=say("hello")) for _ in range(20)))
    refused = [r for r in responses if r.status_code == 429]
    assert {r.status_code for r in responses} == {200, 429}
    assert len(responses) - len(refused) >= 3
    assert {r.headers["retry-after"] for r in refused} == {"1"}
    assert {error_of(r)["code"] for r in refused} == {"rate_limit_exceeded"}
