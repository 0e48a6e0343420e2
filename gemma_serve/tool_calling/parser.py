"""Finds calls in an answer while it streams.

Gemma 3 has no tokens for calls: it writes them as it was asked to, in a code fence or not, with a
word around or not (ai.google.dev/gemma, function calling). Text that cannot be part of a call goes
on at once; text that can is held back until it is one or is not. What comes out of an answer does
not depend on the pieces in which it came in.
"""

import re
from collections.abc import Collection, Sequence
from typing import Final, Protocol

from gemma_serve.tool_calling.call_sink import CallSink
from gemma_serve.tool_calling.events import AnswerEvent
from gemma_serve.tool_calling.json_calls import JsonCallReader
from gemma_serve.tool_calling.python_calls import PythonCallReader
from gemma_serve.tool_calling.source import NotACall, Reading, Source

_FENCE: Final = "```"
_LANGUAGES: Final = ("", "json", "tool_code", "tool_call", "tool_calls", "python")


class BlockReader(Protocol):
    """Knows how one model writes calls."""

    opening: re.Pattern[str]
    """Finds where a block of calls may begin."""

    def read(self) -> Reading[None]:
        """Read one block, and settle what was read of it. Raises ``NotACall``."""


class ToolCallParser:
    """Turns one answer's text into what is said and what is called."""

    def __init__(self, source: Source, sink: CallSink, blocks: BlockReader) -> None:
        """``blocks`` reads from ``source`` into ``sink``."""
        self._source = source
        self._sink = sink
        self._blocks = blocks
        self._reading = self._read()

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._sink.num_calls

    def feed(self, text: str) -> Sequence[AnswerEvent]:
        """What became certain with ``text``, the next piece of the answer."""
        self._source.append(text)
        next(self._reading)  # never over before the source is closed
        return self._sink.drain()

    def finish(self) -> Sequence[AnswerEvent]:
        """What was held back; the answer is over."""
        self._source.is_closed = True
        for _ in self._reading:
            raise AssertionError("a reader waits for text after the end")
        self._sink.finish()
        return self._sink.drain()

    def _read(self) -> Reading[None]:
        source = self._source
        while (yield from self._found_opening()):
            try:
                yield from self._blocks.read()
            except NotACall:
                source.rewind()
                self._say_until(min(source.position + 1, len(source.text)))

    def _found_opening(self) -> Reading[bool]:
        """Say all that comes before a block of calls, if there is one."""
        source = self._source
        while (match := self._blocks.opening.search(source.text, source.position)) is None:
            self._say_until(len(source.text))
            if source.is_closed:
                return False
            yield
        self._say_until(match.start())
        return True

    def _say_until(self, end: int) -> None:
        source = self._source
        if end > source.position:
            self._sink.say(source.text[source.position : end])
        source.position = end
        source.settle()


class GemmaBlockReader:
    """JSON objects and lists, and Python's calls in lists and fences."""

    opening = re.compile(r"[\[{`]")

    def __init__(self, source: Source, sink: CallSink, names: Collection[str]) -> None:
        self._source = source
        self._json = JsonCallReader(source, sink, names)
        self._python = PythonCallReader(source, sink, names)

    def read(self) -> Reading[None]:
        match (yield from self._source.peek()):
            case "`":
                yield from self._fence()
            case "[":
                yield from self._list()
            case _:
                yield from self._json.read()

    def _fence(self) -> Reading[None]:
        """A fence around calls, to its end or as far as there is nothing but calls."""
        source = self._source
        yield from source.expect(_FENCE)
        yield from source.one_of(_LANGUAGES, end="\n")
        opening = yield from source.skip_whitespace()
        while True:
            yield from self._list() if opening == "[" else self._call(opening)
            opening = yield from source.skip_whitespace()
            if opening == "`":
                break
        yield from source.expect(_FENCE)
        source.settle()

    def _list(self) -> Reading[None]:
        """Calls between brackets. What is no call ends the list, wherever it stands."""
        source = self._source
        yield from source.expect("[")
        opening = yield from source.skip_whitespace()
        while True:
            yield from self._call(opening)
            separator = opening = yield from source.skip_whitespace()
            if separator == ",":
                source.position += 1
                source.settle()
                opening = yield from source.skip_whitespace()
            if opening == "]":
                break
            if separator != ",":
                raise NotACall
        source.position += 1
        source.settle()

    def _call(self, opening: str) -> Reading[None]:
        yield from self._json.read() if opening == "{" else self._python.read()


def gemma_parser(
    names: Collection[str], *, max_calls: int | None = None, calls_only: bool = False
) -> ToolCallParser:
    """A parser for Gemma 3's answers.

    ``names``: the functions on offer; what calls another one is text. ``max_calls``: further calls
    are left out. ``calls_only``: the answer can be nothing else, so that what is no call is the
    start of one that was cut off, and left out too.
    """
    source, sink = Source(), CallSink(max_calls, calls_only=calls_only)
    return ToolCallParser(source, sink, GemmaBlockReader(source, sink, names))
