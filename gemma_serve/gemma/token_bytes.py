"""What each token of a SentencePiece-style vocabulary writes."""

import re

from transformers import PreTrainedTokenizerBase

from gemma_serve.gemma.function_calling import UNWRITTEN_TOKENS, WRITTEN_TOKENS, tool_tokens

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """UTF-8 bytes by token id, so that joining them decodes any token ids.

    Empty for control tokens, which are not text, and for ids that the tokenizer does not have.
    """
    control_ids = _control_ids(tokenizer)
    texts = [b""] * vocab_size
    for token, token_id in tokenizer.get_vocab().items():
        if token_id < vocab_size and token_id not in control_ids:
            texts[token_id] = _written_bytes(token)
    return texts


def control_token_names(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The names of the tokens that are no text, such as ``<end_of_turn>``, by id."""
    return {i: str(tokenizer.convert_ids_to_tokens(i)).encode() for i in _control_ids(tokenizer)}


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    control_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    control_ids.update(tokenizer.all_special_ids)
    if tool_tokens(tokenizer):
        control_ids.update(map(tokenizer.convert_tokens_to_ids, UNWRITTEN_TOKENS))
        control_ids.difference_update(map(tokenizer.convert_tokens_to_ids, WRITTEN_TOKENS))
    return control_ids


def _written_bytes(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace(_SPACE, " ").encode()
