"""Formats and logprobs through the whole stack but Ray, with a model that knows nothing of them."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel, Field

from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.openai_api.config import ToolPolicy
from tests.integration.test_http import MODEL, assert_idle, sdk
from tests.tiny import save_tiny_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "dark blue"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 300},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]},
    },
    "required": ["colour", "count", "flags", "note"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GemmaGenerator]:
    folder: Path = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config = EngineConfig(max_num_seqs=8, prefill_chunk_size=128, max_model_len=1536)
    generator = GemmaGenerator.load(ModelConfig(model=str(folder), dtype="float32"), config)
    yield generator
    generator.close()


async def complete(
    generator: GemmaGenerator, *, policy: ToolPolicy | None = None, **fields: object
) -> ChatCompletion:
    async with sdk(generator, tools=policy) as client:
        completion = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Say something."}],
            **fields,  # type: ignore[call-overload]
        )
    assert isinstance(completion, ChatCompletion)
    return completion


async def test_answers_of_many_sequences_fit_their_schema(tiny: GemmaGenerator) -> None:
    completions = await asyncio.gather(
        *(
            complete(
                tiny, response_format=AS_SCHEMA, n=2, seed=seed, temperature=1.5, max_tokens=300
            )
            for seed in range(6)
        )
    )
    choices = [choice for completion in completions for choice in completion.choices]
    assert [choice.finish_reason for choice in choices] == ["stop"] * 12
    for choice in choices:
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    assert len({choice.message.content for choice in choices}) > 6
    assert_idle(tiny)


CALLABLE = {
    "type": "function",
    "function": {"name": "paint", "parameters": {**SCHEMA, "$schema": "http://json-schema.org/"}},
}
OTHER = {"type": "function", "function": {"name": "wait"}}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "function", "function": {"name": "paint"}}, {"paint"}),
        ("required", {"paint", "wait"}),
    ],
)
async def test_calls_that_must_be_made_are_made_and_fit_their_parameters(
    tiny: GemmaGenerator, choice: object, names: set[str]
) -> None:
    completion = await complete(
        tiny,
        tools=[OTHER, CALLABLE],
        tool_choice=choice,
        parallel_tool_calls=False,
        n=8,
        temperature=1.5,
        seed=3,
        max_tokens=300,
    )
    called = set()
    for answer in completion.choices:
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        called.add(call.function.name)
        schema = SCHEMA if call.function.name == "paint" else {"maxProperties": 0}
        jsonschema.validate(json.loads(call.function.arguments), schema)
    assert called <= names


DONE = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}},
    "required": ["done"],
    "additionalProperties": False,
}


async def test_answers_beside_tools_have_their_format_or_are_calls(tiny: GemmaGenerator) -> None:
    completion = await complete(
        tiny,
        policy="prompt",
        tools=[OTHER],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": DONE}},
        parallel_tool_calls=False,
        n=16,
        temperature=1.5,
        seed=3,
        max_tokens=150,
    )
    texts = [c.message.content for c in completion.choices if c.message.tool_calls is None]
    called = [c for c in completion.choices if c.message.tool_calls is not None]
    for text in texts:
        jsonschema.validate(json.loads(text or ""), DONE)
    assert {(c.finish_reason, c.message.content) for c in called} == {("tool_calls", None)}
    assert texts
    assert_idle(tiny)


async def test_parameters_that_cannot_be_enforced_are_named(tiny: GemmaGenerator) -> None:
    parameters = {"properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(tiny, tools=[OTHER, tool], tool_choice="required")
    assert caught.value.param == "tools[1].function.parameters.properties.a"
    assert_idle(tiny)


async def test_joined_stream_is_the_whole_answer(tiny: GemmaGenerator) -> None:
    whole = await complete(tiny, response_format=AS_SCHEMA, seed=5, max_tokens=300)
    async with sdk(tiny) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Say something."}],
            response_format=AS_SCHEMA,  # type: ignore[call-overload]
            seed=5,
            max_tokens=300,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


async def test_penalties_and_biases_do_not_break_the_format(tiny: GemmaGenerator) -> None:
    completion = await complete(
        tiny,
        response_format=AS_SCHEMA,
        frequency_penalty=2,
        logit_bias={"238": 100, "1": 100},
        max_tokens=300,
        extra_body={"top_k": 3, "repetition_penalty": 2.0, "ignore_eos": True},
    )
    jsonschema.validate(json.loads(completion.choices[0].message.content or ""), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"guided_choice": ["left", "right"]}, {"left", "right"}),
        ({"guided_regex": "(ab){2}"}, {"abab"}),
        ({"grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
    ],
)
async def test_every_kind_of_format_is_kept(
    tiny: GemmaGenerator, fields: dict[str, object], texts: set[str]
) -> None:
    completion = await complete(tiny, extra_body=fields, max_tokens=50)
    assert completion.choices[0].message.content in texts
    assert completion.choices[0].finish_reason == "stop"


class Thing(BaseModel):
    colour: str = Field(max_length=3)
    count: int = Field(ge=0, le=9)


async def test_the_sdk_parses_an_answer_into_a_model(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        completion = await client.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": "Say something."}],
            response_format=Thing,
            max_tokens=100,
        )
    assert isinstance(completion.choices[0].message.parsed, Thing)


async def test_schema_that_cannot_be_enforced_is_a_400_with_its_place(
    tiny: GemmaGenerator,
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(
            tiny,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            },
        )
    assert caught.value.param == "response_format.json_schema.schema.properties.a"
    assert "uniqueItems" in caught.value.message


async def test_banning_all_that_fits_is_an_error_and_not_garbage(tiny: GemmaGenerator) -> None:
    with pytest.raises(openai.BadRequestError, match="rule every token out"):
        await complete(
            tiny,
            logit_bias={str(238 + ord("y")): -100},
            extra_body={"guided_choice": ["yes"]},
        )
    assert_idle(tiny)


async def test_joined_bytes_of_logprobs_are_the_answer(tiny: GemmaGenerator) -> None:
    completion = await complete(tiny, logprobs=True, top_logprobs=20, max_tokens=40, seed=1)
    choice = completion.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    written = b"".join(bytes(entry.bytes or ()) for entry in entries)
    assert written.decode(errors="replace") == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 20
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] <= 0
