"""Feeds answers to parsers, in pieces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gemma_serve.tool_calling.events import AnswerEvent, ArgumentsPiece, CallStarted, TextPiece
from gemma_serve.tool_calling.parser import ToolCallParser


@dataclass
class Outcome:
    """What an answer turned out to be, in the order in which it was said."""

    items: list[str | tuple[str, str]] = field(default_factory=list)
    """Text, and calls as name and arguments."""

    def add(self, event: AnswerEvent) -> None:
        last = self.items[-1] if self.items else None
        match event:
            case TextPiece(text) if isinstance(last, str):
                self.items[-1] = last + text
            case TextPiece(text):
                self.items.append(text)
            case CallStarted(name=name):
                self.items.append((name, ""))
            case ArgumentsPiece(text=text):
                assert isinstance(last, tuple), "arguments come right after their call"
                self.items[-1] = (last[0], last[1] + text)


def outcome(parser: ToolCallParser, pieces: Sequence[str]) -> list[str | tuple[str, str]]:
    """What ``parser`` makes of an answer that comes in ``pieces``."""
    result = Outcome()
    for piece in pieces:
        for event in parser.feed(piece):
            result.add(event)
    for event in parser.finish():
        result.add(event)
    return result.items


def assert_same_for_all_two_way_splits(
    make_parser: Callable[[], ToolCallParser], text: str, expected: list[str | tuple[str, str]]
) -> None:
    for cut in range(len(text) + 1):
        assert outcome(make_parser(), [text[:cut], text[cut:]]) == expected, cut
    assert outcome(make_parser(), list(text)) == expected
