"""Log probabilities in the form of OpenAI's older endpoint: parallel lists over tokens."""

import codecs
from collections.abc import Sequence
from typing import TypedDict

from gemma_serve.generation import PromptToken, SampledLogprobs


class LogprobsPayload(TypedDict):
    """``CompletionLogprobs`` as it is written: lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def empty_logprobs() -> LogprobsPayload:
    """The lists of no tokens."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def extend_logprobs(logprobs: LogprobsPayload, more: LogprobsPayload) -> None:
    """Append the tokens of ``more``."""
    logprobs["tokens"] += more["tokens"]
    logprobs["token_logprobs"] += more["token_logprobs"]
    logprobs["top_logprobs"] += more["top_logprobs"]
    logprobs["text_offset"] += more["text_offset"]


class LogprobsWriter:
    """Writes the tokens of one choice in order; knows where in the text each begins."""

    def __init__(self, *, as_token_ids: bool) -> None:
        """``as_token_ids``: write every token as ``token_id:7``."""
        self._as_token_ids = as_token_ids
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write_first(self, token: PromptToken, shown: bytes) -> LogprobsPayload:
        """A prompt's first token, which nothing before it could foretell."""
        return {
            "tokens": [self._name(token.token_id, b"" if token.is_control else token.written)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._advance(shown)],
        }

    def write(
        self, positions: Sequence[SampledLogprobs], shown: Sequence[bytes] | None = None
    ) -> LogprobsPayload:
        """The next tokens. ``shown``: what they are in the text, if not their bytes."""
        texts = [p.chosen.token_bytes for p in positions] if shown is None else shown
        payload = empty_logprobs()
        for position, text in zip(positions, texts, strict=True):
            chosen = position.chosen
            payload["tokens"].append(self._name(chosen.token_id, chosen.token_bytes))
            payload["token_logprobs"].append(chosen.logprob)
            payload["top_logprobs"].append(self._alternatives(position))
            payload["text_offset"].append(self._advance(text))
        return payload

    def _alternatives(self, position: SampledLogprobs) -> dict[str, float]:
        """The most probable tokens first; the chosen one is always among them."""
        named: dict[str, float] = {}
        for token in (*position.top, position.chosen):
            named.setdefault(self._name(token.token_id, token.token_bytes), token.logprob)
        return named

    def _name(self, token_id: int, token_bytes: bytes) -> str:
        """Its text, or a name that no text has: of a control token, or of half a character."""
        if self._as_token_ids or not token_bytes:
            return f"token_id:{token_id}"
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def _advance(self, token_bytes: bytes) -> int:
        """Where the token begins, in characters."""
        offset = self._offset
        self._offset += len(self._characters.decode(token_bytes))
        return offset
