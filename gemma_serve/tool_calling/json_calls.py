"""Calls as JSON objects: ``{"name": "f", "parameters": {"a": 1}}`` and what models make of it."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from gemma_serve.tool_calling.call_sink import CallSink
from gemma_serve.tool_calling.json_extent import JsonExtent
from gemma_serve.tool_calling.source import EndOfText, NotACall, Reading, Source

_NAME_KEYS: Final = ("name", "function")
_ARGUMENTS_KEYS: Final = ("parameters", "arguments", "args")
_KEYS: Final = (*_NAME_KEYS, *_ARGUMENTS_KEYS, "type")
_MAX_HELD_DEPTH: Final = 64
"""Brackets within arguments whose function is not known yet. Without a bound, an answer of nothing
but brackets would be read again once for each."""


@dataclass(slots=True)
class _Members:
    """What is known of a call that has not gone to the sink."""

    name: str | None = None
    arguments: str | None = None


class JsonCallReader:
    """Reads one call; its arguments go to the sink while they arrive.

    It takes OpenAI's own form too, ``{"type": "function", "function": {...}}``, arguments that are
    a string of JSON, and the members in any order. Any other member ahead of the arguments makes
    it some other object.
    """

    def __init__(self, source: Source, sink: CallSink, names: Collection[str]) -> None:
        self._source = source
        self._sink = sink
        self._names = names

    def read(self) -> Reading[None]:
        """Raises ``NotACall`` while nothing has gone to the sink."""
        members = _Members()
        yield from self._source.expect("{")
        while not (yield from self._made_call_of(members)):
            if not (yield from self._goes_on()):
                if members.name is None:
                    raise NotACall
                self._call(members.name, "{}")
                return
        yield from self._finish_object()

    def read_exact(self) -> Reading[None]:
        """The same for an object that is held to ``call_schema``: nothing else is a call."""
        source = self._source
        yield from source.expect("{")
        if (yield from self._key()) != "name":
            raise NotACall
        yield from source.skip_whitespace()
        name = yield from self._word(self._names)
        if not (yield from self._goes_on()) or (yield from self._key()) != "parameters":
            raise NotACall
        if (yield from source.skip_whitespace()) != "{":
            raise NotACall
        self._sink.start(name)
        yield from self._pass_on_arguments()
        yield from self._finish_object()

    def _made_call_of(self, members: _Members) -> Reading[bool]:
        """Read one more member; whether all of the call has gone to the sink with it."""
        key = yield from self._key()
        opening = yield from self._source.skip_whitespace()
        if key == "type":
            yield from self._word(("function",))
        elif key == "function" and opening == "{" and members == _Members():
            yield from self.read()
            return True
        elif key in _NAME_KEYS and members.name is None:
            members.name = yield from self._word(self._names)
        elif key not in _ARGUMENTS_KEYS or members.arguments is not None:
            raise NotACall
        elif opening == "{" and members.name is not None:
            self._sink.start(members.name)
            yield from self._pass_on_arguments()
            return True
        else:
            members.arguments = yield from self._held_arguments(opening)
        if members.name is None or members.arguments is None:
            return False
        self._call(members.name, members.arguments)
        return True

    def _call(self, name: str, arguments: str) -> None:
        self._sink.start(name)
        self._sink.add(arguments)
        self._source.settle()

    def _key(self) -> Reading[str]:
        yield from self._source.skip_whitespace()
        key = yield from self._word(_KEYS)
        yield from self._source.skip_whitespace()
        yield from self._source.expect(":")
        return key

    def _word(self, words: Collection[str]) -> Reading[str]:
        yield from self._source.expect('"')
        return (yield from self._source.one_of(words, end='"'))

    def _goes_on(self) -> Reading[bool]:
        """Whether a comma comes next, and not the closing brace."""
        yield from self._source.skip_whitespace()
        character = yield from self._source.take()
        if character not in ",}":
            raise NotACall
        return character == ","

    def _pass_on_arguments(self) -> Reading[None]:
        source, extent = self._source, JsonExtent()
        while True:
            text, source.position = extent.read(source.text, source.position)
            self._sink.add(text)
            source.settle()
            if extent.depth == 0 and text:
                return
            if source.is_closed:
                raise EndOfText
            yield

    def _held_arguments(self, opening: str) -> Reading[str]:
        if opening == "{":
            return (yield from self._held_object())
        if opening == '"':
            return _unwrapped((yield from self._held_string()))
        yield from self._source.expect("null")
        return "{}"

    def _held_object(self) -> Reading[str]:
        source, extent = self._source, JsonExtent(_MAX_HELD_DEPTH)
        pieces: list[str] = []
        while True:
            text, source.position = extent.read(source.text, source.position)
            pieces.append(text)
            if extent.depth == 0 and text:
                return "".join(pieces)
            if source.is_closed:
                raise EndOfText
            yield

    def _held_string(self) -> Reading[str]:
        """A JSON string with its quotes."""
        text = yield from self._source.take()
        while (character := (yield from self._source.take())) != '"':
            text += character
            if character == "\\":
                text += yield from self._source.take()
        return text + '"'

    def _finish_object(self) -> Reading[None]:
        """Read the rest of a call's object, if that is what comes: its members say nothing more."""
        source = self._source
        try:
            while (yield from source.skip_whitespace()) == ",":
                source.position += 1
                yield from self._skip_member()
            if (yield from source.peek()) == "}":
                source.position += 1
                source.settle()
            else:
                source.rewind()
        except EndOfText:
            source.settle()
            raise

    def _skip_member(self) -> Reading[None]:
        source = self._source
        if (yield from source.skip_whitespace()) != '"':
            raise NotACall
        yield from self._held_string()
        yield from source.skip_whitespace()
        yield from source.expect(":")
        opening = yield from source.skip_whitespace()
        if opening == '"':
            yield from self._held_string()
        elif opening in "{[":
            yield from self._held_object()
        else:
            while (yield from source.peek()) not in ",}] \t\r\n":
                source.position += 1


def _unwrapped(string: str) -> str:
    """The JSON object within a JSON string."""
    try:
        text: str = json.loads(string, strict=False)
        text.encode()
    except ValueError:  # of which JSON's and Unicode's errors are kinds
        raise NotACall from None
    if text.strip() and not text.lstrip().startswith("{"):
        raise NotACall
    return text.strip() or "{}"
