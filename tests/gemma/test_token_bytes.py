import pytest
from transformers import PreTrainedTokenizerBase

from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.gemma.token_bytes import token_bytes

VOCAB_SIZE = 512
NUM_ROWS = 520
"""Rows of the model: 512 tokens, the soft token, and seven that are nothing."""

TEXTS = [
    "Hello, world!",
    "  two  spaces\tand\n\n\nnewlines ",
    "你好。世界。 日本語 한국어",
    "नमस्ते שלום Привет ñandú",
    "😀 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "NUL \x00 and DEL \x7f",
    "x" * 1000,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return synthetic_tokenizer(
        vocab_size=VOCAB_SIZE, boi_token_id=509, eoi_token_id=510, image_token_id=512
    )


@pytest.mark.parametrize("text", TEXTS)
def test_joined_bytes_are_the_decoded_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    texts = token_bytes(tokenizer, NUM_ROWS)
    token_ids = tokenizer(f"<start_of_turn>{text}<end_of_turn>")["input_ids"]
    joined = b"".join(texts[token_id] for token_id in token_ids).decode()
    assert joined == text == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_control_tokens_write_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = token_bytes(tokenizer, NUM_ROWS)
    assert [texts[i] for i in (0, 1, 2, 3, 4, 105, 106, 509, 510, 512)] == [b""] * 10


def test_every_row_of_the_model_has_an_entry(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = token_bytes(tokenizer, NUM_ROWS)
    assert len(texts) == NUM_ROWS
    assert texts[VOCAB_SIZE + 1 :] == [b""] * 7


def test_rows_that_the_model_lacks_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(token_bytes(tokenizer, 300)) == 300


def test_byte_tokens_write_their_byte_and_newline_tokens_theirs(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = token_bytes(tokenizer, NUM_ROWS)
    assert texts[238:494] == [bytes([byte]) for byte in range(256)]
    assert texts[107:110] == [b"\n", b"\n\n", b"\n\n\n"]
    assert texts[494] == b" "
