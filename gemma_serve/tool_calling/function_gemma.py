"""Calls of FunctionGemma, which has tokens for them.

``<start_function_call>call:f{a:1,b:<escape>x<escape>}<end_function_call>``, from
ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices.
"""

import json
import re
from collections.abc import Collection
from typing import Final

from gemma_serve.tool_calling.call_sink import CallSink
from gemma_serve.tool_calling.parser import ToolCallParser
from gemma_serve.tool_calling.source import NotACall, Reading, Source

START: Final = "<start_function_call>"
END: Final = "<end_function_call>"
ESCAPE: Final = "<escape>"

_MAX_DEPTH: Final = 64
_SCALAR: Final = re.compile(
    r"true|false|null|True|False|None|-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?"
)
# Chat templates show values as Python writes them, so the model does too.
_PYTHON_NAMES: Final = {"True": "true", "False": "false", "None": "null"}
_KEY: Final = re.compile(r"([^:{}\[\],<]+):")


class FunctionGemmaBlockReader:
    """Reads one call. Its arguments become JSON as a whole."""

    opening = re.compile("<")

    def __init__(self, source: Source, sink: CallSink, names: Collection[str]) -> None:
        self._source = source
        self._sink = sink
        self._names = names

    def read(self) -> Reading[None]:
        source = self._source
        yield from source.expect(f"{START}call:")
        name = yield from source.one_of(self._names, end="{")
        text = "{"
        while not text.endswith(END):
            text += yield from source.take()
        arguments = arguments_of(text.removesuffix(END))
        self._sink.start(name)
        self._sink.add(arguments)
        source.settle()


def function_gemma_parser(
    names: Collection[str], *, max_calls: int | None = None
) -> ToolCallParser:
    """A parser for FunctionGemma's answers; as ``gemma_parser``."""
    source, sink = Source(), CallSink(max_calls)
    return ToolCallParser(source, sink, FunctionGemmaBlockReader(source, sink, names))


def arguments_of(text: str) -> str:
    """JSON of ``{a:1,b:<escape>x<escape>}``. Raises ``NotACall``."""
    pieces: list[str] = []
    if _Value(text, pieces).read(0, depth=0) != len(text):
        raise NotACall
    return "".join(pieces)


class _Value:
    """Writes values of ``text`` as JSON to ``pieces``."""

    def __init__(self, text: str, pieces: list[str]) -> None:
        self._text = text
        self._pieces = pieces

    def read(self, start: int, *, depth: int) -> int:
        """Where the value that begins at ``start`` ends."""
        if depth > _MAX_DEPTH:
            raise NotACall
        if self._text.startswith(ESCAPE, start):
            return self._string(start + len(ESCAPE))
        match self._text[start : start + 1]:
            case "{":
                return self._items(start + 1, "}", depth)
            case "[":
                return self._items(start + 1, "]", depth)
            case _:
                return self._scalar(start)

    def _string(self, start: int) -> int:
        end = self._text.find(ESCAPE, start)
        if end < 0:
            raise NotACall
        self._pieces.append(json.dumps(self._text[start:end], ensure_ascii=False))
        return end + len(ESCAPE)

    def _scalar(self, start: int) -> int:
        match = _SCALAR.match(self._text, start)
        if match is None:
            raise NotACall
        self._pieces.append(_PYTHON_NAMES.get(match[0], match[0]))
        return match.end()

    def _items(self, position: int, closing: str, depth: int) -> int:
        self._pieces.append("{" if closing == "}" else "[")
        if self._text.startswith(closing, position):
            self._pieces.append(closing)
            return position + 1
        while True:
            if closing == "}":
                position = self._key(position)
            position = self.read(position, depth=depth + 1)
            following = self._text[position : position + 1]
            if following not in {",", closing}:
                raise NotACall
            self._pieces.append(", " if following == "," else closing)
            position += 1
            if following == closing:
                return position

    def _key(self, start: int) -> int:
        match = _KEY.match(self._text, start)
        if match is None:
            raise NotACall
        self._pieces.append(f"{json.dumps(match[1].strip(), ensure_ascii=False)}: ")
        return match.end()
