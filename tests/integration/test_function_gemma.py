"""A checkpoint with tokens for calls, through the whole stack but Ray."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall, ChatCompletionToolUnionParam

from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.function_calling import UNWRITTEN_TOKENS, WRITTEN_TOKENS
from gemma_serve.gemma.generator import GemmaGenerator
from tests.integration.test_http import MODEL, assert_idle, sdk
from tests.tiny import save_tiny_checkpoint

FIRST_TOKEN_ID = 200
"""Of ids that stand for nothing in tiny vocabularies, as in Gemma's own its unused ones."""
TOOLS: list[ChatCompletionToolUnionParam] = [
    {
        "type": "function",
        "function": {
            "name": "paint",
            "description": "Paints it.",
            "parameters": {"type": "object", "properties": {"colour": {"enum": ["red"]}}},
        },
    }
]
CALL = "<start_function_call>call:paint{colour:<escape>red<escape>}<end_function_call>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GemmaGenerator]:
    folder: Path = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    give_tool_tokens(folder / "tokenizer.json")
    config = EngineConfig(max_num_seqs=4, prefill_chunk_size=128, max_model_len=2048)
    generator = GemmaGenerator.load(ModelConfig(model=str(folder), dtype="float32"), config)
    yield generator
    generator.close()


def give_tool_tokens(path: Path) -> None:
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for token_id, token in enumerate(sorted(WRITTEN_TOKENS | UNWRITTEN_TOKENS), FIRST_TOKEN_ID):
        vocabulary[token] = vocabulary.pop(f"▁w{token_id}")
        fields = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": token_id, "content": token, **fields})
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


async def test_call_in_its_tokens_is_found_without_any_setting(tiny: GemmaGenerator) -> None:
    assert (await tiny.describe()).tool_form == "function_gemma"
    async with sdk(tiny) as client:
        completion = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Paint it."}],
            tools=TOOLS,
            max_tokens=200,
            extra_body={"structured_outputs": {"choice": [CALL]}},
        )
    (choice,) = completion.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert (call.function.name, call.function.arguments) == ("paint", '{"colour": "red"}')
    assert_idle(tiny)


async def test_call_that_must_be_made_fits_its_parameters(tiny: GemmaGenerator) -> None:
    async with sdk(tiny) as client:
        completion = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Paint it."}],
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=200,
        )
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert json.loads(call.function.arguments) in ({}, {"colour": "red"})


async def test_prompt_of_a_tool_turn_is_short(tiny: GemmaGenerator) -> None:
    """Each token for calls is one token of the prompt; all other text is a token per byte."""
    async with sdk(tiny) as client:
        counts = []
        for tools in ([], TOOLS):
            completion = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hi"}],
                tools=tools,
                max_tokens=1,
            )
            assert completion.usage is not None
            counts.append(completion.usage.prompt_tokens)
    declaration = (
        "declaration:paint{description:Paints it.,parameters:{properties:{colour:{enum:[red]}},"
        "type:OBJECT}}"
    )
    trigger = "You are a model that can do function calling with the following functions"
    assert counts[1] - counts[0] == len(trigger) + len(declaration) + 2 + 6 + len("\n\n") - 1
