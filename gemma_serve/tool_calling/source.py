"""The answer's characters as they arrive, for readers that wait for more in mid-word."""

from collections.abc import Collection, Generator
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")

Reading: TypeAlias = Generator[None, None, T]
"""A reader that has come as far as the text goes yields, and is resumed when there is more."""

_WHITESPACE: Final = " \t\r\n"


class NotACall(Exception):
    """What began like a call is none. Text that is not settled is prose."""


class EndOfText(NotACall):
    """The answer ends where a call would go on."""


class Source:
    """Text with a reading position, and a mark up to which it is settled what the text is."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.is_closed = False
        """No more text will come."""
        self._mark = 0

    def append(self, text: str) -> None:
        self.text = self.text[self._mark :] + text
        self.position -= self._mark
        self._mark = 0

    def settle(self) -> None:
        """All text read so far is accounted for; a ``NotACall`` does not reach back beyond it."""
        self._mark = self.position

    def rewind(self) -> None:
        """Read again from the mark."""
        self.position = self._mark

    def peek(self) -> Reading[str]:
        """The next character, which stays unread. Raises ``EndOfText``."""
        while self.position == len(self.text):
            if self.is_closed:
                raise EndOfText
            yield
        return self.text[self.position]

    def take(self) -> Reading[str]:
        """The next character. Raises ``EndOfText``."""
        character = yield from self.peek()
        self.position += 1
        return character

    def skip_whitespace(self) -> Reading[str]:
        """The character after any whitespace, which stays unread. Raises ``EndOfText``."""
        while (character := (yield from self.peek())) in _WHITESPACE:
            self.position += 1
        return character

    def expect(self, literal: str) -> Reading[None]:
        """Read ``literal``; raise ``NotACall`` at the first character that differs."""
        for wanted in literal:
            if (yield from self.take()) != wanted:
                raise NotACall

    def one_of(self, words: Collection[str], *, end: str) -> Reading[str]:
        """Read one of ``words`` and the character ``end``, which is in none of them.

        Raises ``NotACall`` as soon as no word can come of it.
        """
        word = ""
        while (character := (yield from self.take())) != end:
            word += character
            if not any(other.startswith(word) for other in words):
                raise NotACall
        if word not in words:
            raise NotACall
        return word
