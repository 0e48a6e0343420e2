"""The logprobs of a choice: one entry for every token with a part in the text."""

import codecs
from collections import deque
from typing import TypedDict

from gemma_serve.generation import GenerationDelta, SampledLogprobs, TokenLogprob


class TopLogprobPayload(TypedDict):
    """``response_schemas.TopLogprob`` as it is written."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobPayload(TopLogprobPayload):
    """``response_schemas.ContentLogprob`` as it is written."""

    top_logprobs: list[TopLogprobPayload]


class ChoiceLogprobsPayload(TypedDict):
    """``response_schemas.ChoiceLogprobs`` as it is written."""

    content: list[TokenLogprobPayload]
    refusal: None


class VisibleLogprobs:
    """Holds the entries of tokens back until their text is out.

    So the tokens of a stop string, and those that end a turn, get no entry: nobody sees them.
    """

    def __init__(self, *, as_token_ids: bool = False) -> None:
        """``as_token_ids``: write every token as ``token_id:7``."""
        self._as_token_ids = as_token_ids
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")  # as the engine's
        self._num_read_chars = 0
        self._num_shown_chars = 0
        self._held: deque[tuple[int, SampledLogprobs]] = deque()
        """With the position in the text where each one's begins."""

    def add(self, delta: GenerationDelta) -> list[TokenLogprobPayload]:
        """The entries of the tokens whose text began to be shown by ``delta``."""
        for of_token in delta.logprobs:
            if of_token.chosen.token_bytes:
                self._held.append((self._num_read_chars, of_token))
                text = self._characters.decode(of_token.chosen.token_bytes)
                self._num_read_chars += len(text)
        self._num_shown_chars += len(delta.text)
        visible = []
        while self._held and self._held[0][0] < self._num_shown_chars:
            visible.append(self._payload(self._held.popleft()[1]))
        return visible

    def _payload(self, of_token: SampledLogprobs) -> TokenLogprobPayload:
        return {
            **self._top_payload(of_token.chosen),
            "top_logprobs": [self._top_payload(token) for token in of_token.top],
        }

    def _top_payload(self, token: TokenLogprob) -> TopLogprobPayload:
        text = token.token_bytes.decode(errors="replace")
        return {
            "token": f"token_id:{token.token_id}" if self._as_token_ids else text,
            "logprob": token.logprob,
            "bytes": list(token.token_bytes) or None,
        }
