"""A vocabulary small enough for hundreds of grammars: bytes, and a few longer tokens."""

from collections.abc import Sequence

from gemma_serve.structured_output.compiler import ConstraintCompiler

_LONGER = (b'{"', b'": ', b'", "', b"true", b"null", b"  ", b"\n", "é".encode(), b"ab", b"A")
EOS = 256
END_OF_TURN = 257
TOKEN_BYTES: Sequence[bytes] = (*(bytes([i]) for i in range(256)), b"", b"", *_LONGER)
"""By id. ``A`` is there twice, as bytes are in Gemma's vocabulary."""


def encode(text: str) -> list[int]:
    return list(text.encode())


def text_of(token_ids: Sequence[int]) -> str:
    return b"".join(TOKEN_BYTES[i] for i in token_ids).decode()


def make_compiler() -> ConstraintCompiler:
    return ConstraintCompiler(TOKEN_BYTES, (EOS, END_OF_TURN), encode)
