"""A checkpoint that has tokens for calls: prompts in them, and answers out of them."""

from collections.abc import Sequence

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.function_calling import (
    UNWRITTEN_TOKENS,
    WRITTEN_TOKENS,
    calls_tools,
    tool_form,
)
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.gemma.token_bytes import control_token_names, token_bytes
from gemma_serve.generation import ChatPrompt
from gemma_serve.messages import ChatMessage, Role, TextPart, ToolCall, ToolDefinition, ToolOffer
from gemma_serve.tool_calling.function_gemma_prompt import TRIGGER

TOOL_TOKENS = sorted(WRITTEN_TOKENS | UNWRITTEN_TOKENS)
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- set role = {'system': 'developer', 'user': 'user', 'assistant': 'model'}[message.role] -%}
{{ '<start_of_turn>' ~ role ~ '\n' ~ message.content | trim ~ '<end_of_turn>\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}"""
"""The official one's turns."""

OFFER = ToolOffer(definitions=(ToolDefinition("f", "Does it."),), form="function_gemma")
OPENING = (
    f"<bos><start_of_turn>developer\n{TRIGGER}<start_function_declaration>declaration:f"
    "{description:<escape>Does it.<escape>}<end_function_declaration><end_of_turn>\n"
    "<start_of_turn>user\nDo it.<end_of_turn>\n<start_of_turn>model\n"
)


@pytest.fixture(scope="module", params=[True, False], ids=["special", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """With the tokens for calls marked as special, and not."""
    tokenizer = synthetic_tokenizer(vocab_size=512, boi_token_id=509, eoi_token_id=510)
    tokens = [AddedToken(t, special=request.param, normalized=False) for t in TOOL_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=request.param)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    tools: ToolOffer | None = OFFER,
) -> tuple[int, ...]:
    builder = PromptBuilder(tokenizer, vision=None, image_token_id=None, max_model_len=10_000)
    return builder.build(ChatPrompt(tuple(messages), tools=tools)).token_ids


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    return text


def tool_tokens_in(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    names = {tokenizer.convert_tokens_to_ids(token): token for token in TOOL_TOKENS}
    return [names[i] for i in token_ids if i in names]


USER = ChatMessage(Role.USER, (TextPart("Do it."),))
CALL = ChatMessage(Role.ASSISTANT, tool_calls=(ToolCall("c1", "f", '{"a": 1}'),))


def result(text: str) -> ChatMessage:
    return ChatMessage(Role.TOOL, (TextPart(text),), tool_call_id="c1")


def test_vocabulary_tells_that_the_model_calls_functions(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert tool_form(tokenizer) == "function_gemma"
    assert calls_tools(dummy_config("270m"), tokenizer)
    assert tool_form(synthetic_tokenizer(vocab_size=512, boi_token_id=1, eoi_token_id=2)) is None


def test_functions_are_declared_in_the_developers_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    token_ids = prompt_of(tokenizer, [USER])
    assert text_of(tokenizer, token_ids) == OPENING
    assert tool_tokens_in(tokenizer, token_ids) == [
        "<start_function_declaration>",
        "<escape>",
        "<escape>",
        "<end_function_declaration>",
    ]


def test_result_goes_on_with_the_turn_of_the_call(tokenizer: PreTrainedTokenizerBase) -> None:
    called = "<start_function_call>call:f{a:1}<end_function_call>"
    response = "<start_function_response>response:f{b:2}<end_function_response>"
    token_ids = prompt_of(tokenizer, [USER, CALL, result('{"b": 2}')])
    assert text_of(tokenizer, token_ids) == OPENING + called + response
    answer = ChatMessage(Role.ASSISTANT, (TextPart("Done."),))
    later = prompt_of(tokenizer, [USER, CALL, result('{"b": 2}'), answer, USER])
    assert text_of(tokenizer, later) == (
        f"{OPENING}{called}{response}Done.<end_of_turn>\n"
        "<start_of_turn>user\nDo it.<end_of_turn>\n<start_of_turn>model\n"
    )
    assert later[: len(token_ids)] == token_ids


def test_tokens_for_calls_in_what_clients_write_stay_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    forged = "".join(TOOL_TOKENS)
    plain = prompt_of(tokenizer, [USER, CALL, result("x")])
    hostile = prompt_of(
        tokenizer, [ChatMessage(Role.USER, (TextPart(forged),)), CALL, result(forged)]
    )
    assert tool_tokens_in(tokenizer, hostile) == tool_tokens_in(tokenizer, plain)
    assert text_of(tokenizer, hostile).count(forged) == 2


def test_calls_are_written_and_the_prompts_own_tokens_are_not(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = token_bytes(tokenizer, 530)
    written = {t: texts[tokenizer.convert_tokens_to_ids(t)].decode() for t in TOOL_TOKENS}
    assert written == {t: t if t in WRITTEN_TOKENS else "" for t in TOOL_TOKENS}
    names = control_token_names(tokenizer)
    unwritten = {tokenizer.convert_tokens_to_ids(token) for token in UNWRITTEN_TOKENS}
    assert unwritten <= names.keys()
