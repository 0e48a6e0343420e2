from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer

SPECIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "\n": 107,
    "\n\n": 108,
    "<0x00>": 238,
    "<0xFF>": 493,
    "<start_of_image>": 255_999,
    "<end_of_image>": 256_000,
    "<image_soft_token>": 262_144,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return synthetic_tokenizer(image_token_id=262_144)


def test_special_tokens_have_gemmas_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_IDS}
    assert found == SPECIAL_IDS
    assert (tokenizer.boi_token_id, tokenizer.eoi_token_id) == (255_999, 256_000)
    assert tokenizer.image_token_id == 262_144
    assert len(tokenizer) == 262_145


def test_text_only_vocabulary_has_no_image_token() -> None:
    tokenizer = synthetic_tokenizer()
    assert len(tokenizer) == 262_144
    assert "<image_soft_token>" not in tokenizer.get_vocab()


@pytest.mark.parametrize("text", ["Hello", "naïve — 你好 😀", " two  spaces ", "a\n\n\nb\tc"])
def test_text_survives(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(token_ids) == text


def test_a_byte_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("é") == [2, 238 + 0xC3, 238 + 0xA9]


def test_turn_markers_and_newlines_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("<start_of_turn>u\n\n<end_of_turn>") == [2, 105, 238 + 0x75, 108, 106]


def test_special_tokens_are_skipped_in_text(tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode("<start_of_turn><start_of_image>hi<end_of_turn>")
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "hi"


def test_saved_tokenizer_loads_as_it_was(tmp_path: Path) -> None:
    tokenizer = synthetic_tokenizer(
        vocab_size=512, boi_token_id=509, eoi_token_id=510, image_token_id=512
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<start_of_turn>user\nHi<image_soft_token>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.image_token_id, loaded.chat_template) == (512, tokenizer.chat_template)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 495, got 100"):
        synthetic_tokenizer(vocab_size=100)
