"""Responses through the whole stack but Ray, with a model that knows nothing of functions."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from openai.types.responses import FunctionToolParam, Response

from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.generator import GemmaGenerator
from tests.integration.test_http import MODEL, assert_idle, sdk
from tests.tiny import save_tiny_checkpoint

PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "coats": {"enum": [1, 2]}},
    "required": ["colour", "coats"],
    "additionalProperties": False,
}
PAINT: FunctionToolParam = {
    "type": "function",
    "name": "paint",
    "parameters": PARAMETERS,
    "strict": True,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GemmaGenerator]:
    folder: Path = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config = EngineConfig(max_num_seqs=4, prefill_chunk_size=128, max_model_len=2048)
    generator = GemmaGenerator.load(ModelConfig(model=str(folder), dtype="float32"), config)
    yield generator
    generator.close()


async def test_forced_call_fits_its_parameters_and_goes_on_with_its_result(
    tiny: GemmaGenerator,
) -> None:
    async with sdk(tiny, tools="prompt") as client:
        first = await client.responses.create(
            model=MODEL,
            input="Paint it.",
            tools=[PAINT],
            tool_choice={"type": "function", "name": "paint"},
            extra_body={"seed": 1},
            max_output_tokens=200,
        )
        (call,) = first.output
        assert call.type == "function_call"
        second = await client.responses.create(
            model=MODEL,
            previous_response_id=first.id,
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Done"}],
            tools=[PAINT],
            max_output_tokens=16,
        )
    assert (first.status, call.name, call.status) == ("completed", "paint", "completed")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.output[0].type == "message"
    assert_idle(tiny)


async def test_streamed_call_is_the_whole_one(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        arguments = []
        for _ in range(2):
            async with client.responses.stream(
                model=MODEL,
                input="Paint it.",
                tools=[PAINT],
                tool_choice="required",
                parallel_tool_calls=False,
                temperature=0,
                max_output_tokens=200,
            ) as stream:
                deltas = [
                    event.delta
                    async for event in stream
                    if event.type == "response.function_call_arguments.delta"
                ]
                response = await stream.get_final_response()
            (call,) = response.output
            assert call.type == "function_call"
            assert "".join(deltas) == call.arguments
            assert len(deltas) > 1
            arguments.append(call.arguments)
    assert arguments[0] == arguments[1]
    assert_idle(tiny)


async def test_logprobs_are_those_of_the_chat(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        response = await client.responses.create(
            model=MODEL,
            input="Hello",
            include=["message.output_text.logprobs"],
            top_logprobs=3,
            temperature=0,
            max_output_tokens=16,
        )
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            logprobs=True,
            top_logprobs=3,
            temperature=0,
            max_tokens=16,
        )
    assert isinstance(response, Response)
    (message,) = response.output
    assert message.type == "message"
    (content,) = message.content
    assert content.type == "output_text"
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert content.text == chat.choices[0].message.content
    assert content.logprobs is not None
    expected = chat.choices[0].logprobs.content
    assert [entry.token for entry in content.logprobs] == [entry.token for entry in expected]
    assert [entry.logprob for entry in content.logprobs] == pytest.approx(
        [entry.logprob for entry in expected], abs=1e-4
    )
    assert {len(entry.top_logprobs) for entry in content.logprobs} == {3}


async def test_input_beyond_the_context_loses_its_first_turns(tiny: GemmaGenerator) -> None:
    turns = [
        {"role": role, "content": f"{number} {'x' * 300}"}
        for number in range(20)
        for role in ("user", "assistant")
    ]
    async with sdk(tiny) as client:
        response = await client.responses.create(
            model=MODEL,
            input=[*turns, {"role": "user", "content": "So?"}],  # type: ignore[list-item]
            truncation="auto",
            max_output_tokens=16,
        )
    assert response.usage is not None
    assert 1300 < response.usage.input_tokens < 2048
    assert_idle(tiny)


async def test_prompts_tokens_and_what_stopped_are_told(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        whole = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            temperature=0,
            max_tokens=8,
            extra_body={"prompt_logprobs": 2, "return_token_ids": True},
        )
        body = whole.to_dict()
        third = body["choices"][0]["token_ids"][2]  # type: ignore[index]
        stopped = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            temperature=0,
            max_tokens=8,
            extra_body={"stop_token_ids": [third]},
        )
    scores, prompt = body["prompt_logprobs"], body["prompt_token_ids"]
    assert isinstance(scores, list)
    assert isinstance(prompt, list)
    assert scores[0] is None
    assert [str(i) in score for i, score in zip(prompt[1:], scores[1:], strict=True)] == [True] * (
        len(prompt) - 1
    )
    choice = stopped.to_dict()["choices"][0]  # type: ignore[index]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", third)
