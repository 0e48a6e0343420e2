"""A checkpoint's tokens as llguidance wants them."""

import logging
from collections.abc import Callable, Sequence

from llguidance import LLTokenizer, TokenizerWrapper

logger = logging.getLogger(__name__)

Encode = Callable[[str], Sequence[int]]


def grammar_tokenizer(
    token_bytes: Sequence[bytes], eos_token_ids: Sequence[int], encode: Encode
) -> LLTokenizer:
    """Index the vocabulary for searching.

    Takes two seconds for Gemma's 262,144 tokens and holds the interpreter's lock, so build it once
    and before there are streams to stall. ``token_bytes``: by id, empty for what is no text.
    ``encode``: how the model's tokenizer writes a text, for text that a grammar leaves no choice
    about; may be called on any thread.
    """
    vocabulary = _Vocabulary(list(token_bytes), eos_token_ids[0], encode)
    tokenizer = LLTokenizer(
        vocabulary, eos_token=list(eos_token_ids), slices=LLTokenizer.json_slices()
    )
    vocabulary.encode_greedily = tokenizer.greedy_tokenize
    return tokenizer


class _Vocabulary(TokenizerWrapper):
    """What llguidance asks of a tokenizer. Calls must not raise: that is a panic over there."""

    def __init__(self, tokens: list[bytes], eos_token_id: int, encode: Encode) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = ()
        self.is_tokenizer_wrapper = True
        self.encode_greedily: Encode = encode
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        try:
            token_ids = self._encode(text)
            # A control token's name in the text may have become that token, which writes nothing.
            if b"".join(self.tokens[i] for i in token_ids) == text.encode():
                return list(token_ids)
        except Exception:
            logger.exception("the tokenizer failed on a text of %d characters", len(text))
        return list(self.encode_greedily(text))
