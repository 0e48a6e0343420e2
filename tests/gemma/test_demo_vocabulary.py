"""Gemma's real vocabulary, from the demo checkpoint."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE
from gemma_serve.gemma.demo import demo_checkpoint
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.gemma.token_bytes import token_bytes
from gemma_serve.generation import ChatPrompt
from gemma_serve.messages import ChatMessage, Role, TextPart

NUM_ROWS = 262_208
"""Rows of the models with eyes; the text-only vocabulary ends 64 earlier."""

TEXTS = [
    "The quick brown fox, it's 3.14!",
    "  two  spaces\tand\n\n\nnewlines \r\n<table><h1>",
    "你好。世界。日本語のテキスト 한국어 ไทย",
    "नमस्ते שָׁלוֹם مرحبا Привет ñandú Ελληνικά",
    "😀👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f \U0001d518 ꙮ \U0001fae8",
    "NUL \x00, DEL \x7f, BOM \ufeff, \u202e",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_checkpoint())
    tokenizer.chat_template = GEMMA_CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def texts_by_id(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    return token_bytes(tokenizer, NUM_ROWS)


@pytest.fixture(scope="module")
def builder(tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
    return PromptBuilder(tokenizer, vision=None, image_token_id=None, max_model_len=32_768)


def user(text: str) -> ChatMessage:
    return ChatMessage(Role.USER, (TextPart(text),))


def test_chat_gives_the_golden_ids(builder: PromptBuilder) -> None:
    """vllm#55288, vllm#52304, lm-eval#1465: two BOS tokens, or none."""
    assert builder.build(ChatPrompt((user("Hello"),))).token_ids == (
        *(2, 105, 2364, 107),
        9259,
        *(106, 107, 105, 4368, 107),
    )


@pytest.mark.parametrize("text", TEXTS)
def test_joined_bytes_are_the_decoded_text(
    tokenizer: PreTrainedTokenizerBase, texts_by_id: list[bytes], text: str
) -> None:
    token_ids = tokenizer(text)["input_ids"]
    joined = b"".join(texts_by_id[token_id] for token_id in token_ids).decode()
    assert joined == text == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_text_streamed_token_by_token_is_whole(
    tokenizer: PreTrainedTokenizerBase, texts_by_id: list[bytes], text: str
) -> None:
    detokenizer = Detokenizer(texts_by_id, ("never",))
    deltas = [detokenizer.append((token_id,)) for token_id in tokenizer(text)["input_ids"]]
    assert "".join(deltas) + detokenizer.flush() == text


def test_no_control_token_can_be_written_by_a_client(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase
) -> None:
    control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    prompt = builder.build(ChatPrompt((user("".join(control_tokens[:1000])),)))
    assert [i for i in prompt.token_ids if i < 107] == [2, 105, 106, 105]
    assert "".join(control_tokens[:1000]) in tokenizer.decode(list(prompt.token_ids))
