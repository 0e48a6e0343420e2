"""Token ids to text, as soon as the text is final.

Incremental decoders in the shape of ``codecs``: feed pieces, take what became final, flush once at
the end. How the stream is cut into pieces never changes the joined result.
"""

import codecs
from collections.abc import Mapping, Sequence
from types import MappingProxyType


class Detokenizer:
    """The text of one sequence up to its first stop string, without half characters."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop: tuple[str, ...],
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        control_token_names: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        """``token_bytes``: UTF-8 bytes by token id. ``stop``: texts that end the sequence, but for
        the first ``min_tokens`` tokens, and are part of its text if ``include_stop``.
        ``control_token_names``: what tokens write instead of their bytes."""
        self._token_bytes = token_bytes
        self._control_token_names = control_token_names
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop_strings = StopStringFinder(stop)
        self._include_stop = include_stop
        self._num_tokens_before_stop = min_tokens

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text; nothing may be appended after it."""
        return self._stop_strings.found

    def append(self, token_ids: Sequence[int]) -> str:
        """What became final: whole characters that can no longer begin a stop string."""
        text = self._characters.decode(b"".join(self._written(i) for i in token_ids))
        self._num_tokens_before_stop -= len(token_ids)
        if self._num_tokens_before_stop >= 0:
            return text
        text = self._stop_strings.feed(text)
        return text + self.matched_stop if self._include_stop and self.matched_stop else text

    def flush(self) -> str:
        """What was held back, at the end of a sequence that no stop string ended.

        Bytes that never became a character come out as U+FFFD.
        """
        text = self._stop_strings.feed(self._characters.decode(b"", final=True))
        return text + self._stop_strings.flush()

    def _written(self, token_id: int) -> bytes:
        return self._control_token_names.get(token_id) or self._token_bytes[token_id]


class StopStringFinder:
    """Passes text on until one of ``stop`` is complete, and never a part of that one.

    Of several, the first to be complete wins, as it would if the text came one character at a time;
    of those that are complete together, the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found: str | None = None
        self._held = ""
        # Longest first: of two that end together, it is met first.
        self._prefixes = [_PrefixMatcher(text) for text in sorted(stop, key=len, reverse=True)]

    def feed(self, text: str) -> str:
        assert self.found is None, "text after a stop string"
        if not self._prefixes:
            return text
        for position, character in enumerate(text):
            for prefix in self._prefixes:
                if prefix.advance(character):
                    self.found = prefix.pattern
                    read = self._held + text[: position + 1]
                    self._held = ""
                    return read.removesuffix(prefix.pattern)
        read = self._held + text
        num_final = len(read) - max(prefix.length for prefix in self._prefixes)
        self._held = read[num_final:]
        return read[:num_final]

    def flush(self) -> str:
        """The text that could have begun a stop string, and did not."""
        held, self._held = self._held, ""
        return held


class _PrefixMatcher:
    """How much of the start of ``pattern`` the text ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, pattern: str) -> None:
        if not pattern:
            raise ValueError("a stop string must not be empty")
        self.pattern = pattern
        self.length = 0
        self._borders = _borders(pattern)

    def advance(self, character: str) -> bool:
        """Read one character; whether the text now ends with the whole pattern."""
        self.length = _extend(self.pattern, self._borders, self.length, character)
        return self.length == len(self.pattern)


def _borders(pattern: str) -> list[int]:
    """For each prefix of ``pattern``: its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in pattern[1:]:
        borders.append(_extend(pattern, borders, borders[-1], character))
    return borders


def _extend(pattern: str, borders: Sequence[int], length: int, character: str) -> int:
    while length > 0 and pattern[length] != character:
        length = borders[length - 1]
    return length + 1 if pattern[length] == character else 0
