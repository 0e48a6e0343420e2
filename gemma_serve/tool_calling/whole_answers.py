"""Answers that are held to a format or to calls, and are the one or the other as a whole."""

import re
from collections.abc import Collection

from gemma_serve.tool_calling.call_sink import CallSink
from gemma_serve.tool_calling.json_calls import JsonCallReader
from gemma_serve.tool_calling.parser import ToolCallParser
from gemma_serve.tool_calling.source import NotACall, Reading, Source


class WholeAnswerReader:
    """Reads an answer that fits ``call_schema.text_or_call_schema``.

    It is calls if it begins with one, and then to its end: a call cannot be taken back. What looks
    like one further on in a text is a part of it.
    """

    opening = re.compile(".", re.DOTALL)

    def __init__(self, source: Source, sink: CallSink, names: Collection[str]) -> None:
        self._source = source
        self._sink = sink
        self._json = JsonCallReader(source, sink, names)

    def read(self) -> Reading[None]:
        """Read to the end of the answer."""
        try:
            yield from self._calls()
        except NotACall:
            self._source.rewind()
        yield from self._rest()

    def _calls(self) -> Reading[None]:
        source = self._source
        if (yield from source.peek()) != "[":
            yield from self._json.read_exact()
            return
        separator = ","
        while separator == ",":
            source.position += 1
            yield from source.skip_whitespace()
            yield from self._json.read_exact()
            separator = yield from source.skip_whitespace()

    def _rest(self) -> Reading[None]:
        """All of a text, or of calls what closes their list."""
        source = self._source
        while True:
            if not self._sink.num_calls:
                self._sink.say(source.text[source.position :])
            source.position = len(source.text)
            source.settle()
            if source.is_closed:
                return
            yield


def whole_answer_parser(names: Collection[str], *, max_calls: int | None = None) -> ToolCallParser:
    """A parser for answers that have a format unless they are calls; as ``gemma_parser``."""
    source, sink = Source(), CallSink(max_calls)
    return ToolCallParser(source, sink, WholeAnswerReader(source, sink, names))
