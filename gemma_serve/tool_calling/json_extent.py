"""Where a JSON value ends, found while it arrives."""

import json
import re
from typing import Final

from gemma_serve.tool_calling.source import NotACall

_OUTSIDE_STRINGS: Final = re.compile(r'["{}\[\]]')
_INSIDE_STRINGS: Final = re.compile(r'["\\\x00-\x1f]')


class JsonExtent:
    """Follows one JSON object or array, from its opening bracket to the one that closes it.

    Only strings and brackets are looked at: what else a model gets wrong stays as it is, because
    what was already sent of it cannot be taken back.
    """

    def __init__(self, max_depth: int | None = None) -> None:
        """``max_depth``: brackets within brackets, beyond which ``read`` raises ``NotACall``."""
        self.depth = 0
        self._max_depth = max_depth
        self._in_string = False
        self._escapes_next = False

    def read(self, text: str, start: int) -> tuple[str, int]:
        """The value's part of ``text`` from ``start`` on, and where that ends.

        The value is complete when ``depth`` is 0 after that. Models write line breaks into strings
        as they are; the part has them as the escapes that JSON wants.
        """
        pieces: list[str] = []
        position = start
        while position < len(text):
            if self._escapes_next:
                self._escapes_next = False
                end = position + 1
                pieces.append(text[position:end])
            else:
                end = self._read_run(text, position, pieces)
            position = end
            if self.depth == 0:
                break
        return "".join(pieces), position

    def _read_run(self, text: str, start: int, pieces: list[str]) -> int:
        """Up to and with the next character that means something."""
        pattern = _INSIDE_STRINGS if self._in_string else _OUTSIDE_STRINGS
        match = pattern.search(text, start)
        if match is None:
            pieces.append(text[start:])
            return len(text)
        pieces.append(text[start : match.start()])
        character = match[0]
        pieces.append(json.dumps(character)[1:-1] if character < " " else character)
        self._note(character)
        return match.end()

    def _note(self, character: str) -> None:
        if character == '"':
            self._in_string = not self._in_string
        elif character == "\\":
            self._escapes_next = True
        elif character in "{[":
            self.depth += 1
            if self._max_depth is not None and self.depth > self._max_depth:
                raise NotACall
        elif character in "}]":
            self.depth -= 1
