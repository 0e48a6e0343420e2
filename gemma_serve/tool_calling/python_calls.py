"""Calls as Python writes them: ``f(a=1, b="x")``. They are parsed and never evaluated."""

import ast
import json
import re
from collections.abc import Collection, Mapping
from typing import Final

from gemma_serve.tool_calling.call_sink import CallSink
from gemma_serve.tool_calling.source import NotACall, Reading, Source

_MAX_DEPTH: Final = 32
"""Brackets within arguments: far beyond any use, and well within what ``ast`` takes."""
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_KNOWN_ESCAPES: Final = frozenset("\\'\"abfnrtvxuUN01234567\n")
_JSON_NAMES: Final[Mapping[str, bool | None]] = {"true": True, "false": False, "null": None}

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class PythonCallReader:
    """Reads one call with keyword arguments that are literals, within ``print()`` or not."""

    def __init__(self, source: Source, sink: CallSink, names: Collection[str]) -> None:
        self._source = source
        self._sink = sink
        self._names = {name: name for name in names}
        # Gemini's tool_code goes through this module, and some of that is in Gemma.
        self._names |= {f"default_api.{name}": name for name in names}

    def read(self) -> Reading[None]:
        """Raises ``NotACall`` while nothing has gone to the sink."""
        source = self._source
        word = yield from source.one_of(("print", *self._names), end="(")
        is_printed = word not in self._names
        if is_printed:
            yield from source.skip_whitespace()
            word = yield from source.one_of(self._names, end="(")
        arguments = arguments_of((yield from self._arguments()))
        self._sink.start(self._names[word])
        self._sink.add(arguments)
        source.settle()
        if is_printed and (yield from source.skip_whitespace()) == ")":
            source.position += 1
            source.settle()

    def _arguments(self) -> Reading[str]:
        """The text between the parentheses; the opening one has been read."""
        source = self._source
        first = yield from source.skip_whitespace()
        if not (first == ")" or first == "_" or first.isalpha()):
            raise NotACall
        text, depth = "", 1
        while True:
            character = yield from source.take()
            if character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
            if depth == 0:
                return text
            if depth > _MAX_DEPTH:
                raise NotACall
            text += character
            if character in "'\"":
                text += yield from self._string_after(character)

    def _string_after(self, quote: str) -> Reading[str]:
        """The rest of a string with its closing quote."""
        source = self._source
        second = yield from source.peek()
        if second == quote:
            source.position += 1
            if (yield from source.peek()) != quote:
                return quote
            source.position += 1
            return quote * 2 + (yield from self._long_string(quote * 3))
        text = ""
        while (character := (yield from source.take())) != quote:
            if character == "\n":
                raise NotACall
            text += character
            if character == "\\":
                text += yield from source.take()
        return text + quote

    def _long_string(self, quotes: str) -> Reading[str]:
        text = ""
        while not text.endswith(quotes):
            character = yield from self._source.take()
            text += character
            if character == "\\":
                text += yield from self._source.take()
        return text


def arguments_of(text: str) -> str:
    """The JSON object of ``a=1, b="x"``. Raises ``NotACall`` for anything but such literals."""
    try:
        call = ast.parse(f"f({_ESCAPE.sub(_mended, text)}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise NotACall
        arguments: dict[str, Json] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in arguments:
                raise NotACall
            arguments[keyword.arg] = _literal(keyword.value)
        return _dumps(arguments)
    # What the parser raises for what is no Python, or too much of it.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotACall from None


def _mended(escape: re.Match[str]) -> str:
    """A backslash that Python would warn of stands for itself, as it does in Python so far."""
    return escape[0] if escape[1] in _KNOWN_ESCAPES else f"\\{escape[0]}"


def _literal(node: ast.expr) -> Json:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(v) for key, v in zip(keys, values, strict=True)}
        case _:
            raise NotACall


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise NotACall


def _dumps(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is a string in Python, and text nowhere
        return json.dumps(value)
    return text
