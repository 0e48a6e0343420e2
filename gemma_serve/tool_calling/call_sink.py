"""Collects what an answer turns out to be."""

import secrets
from collections.abc import Sequence

from gemma_serve.tool_calling.events import AnswerEvent, ArgumentsPiece, CallStarted, TextPiece


class CallSink:
    """Takes text and calls in their order, and gives them out as events."""

    def __init__(self, max_calls: int | None, *, calls_only: bool = False) -> None:
        """``max_calls``: further ones are left out; ``None`` takes all. ``calls_only``: what is no
        call is the beginning of one that was cut off, and is not said."""
        self.num_calls = 0
        self._max_calls = max_calls
        self._calls_only = calls_only
        self._is_full = False
        self._events: list[AnswerEvent] = []
        self._after_text = False
        self._gap = ""

    def say(self, text: str) -> None:
        """Whitespace that a call may follow waits for what comes: next to calls it is layout."""
        if self._calls_only:
            return
        if not self._after_text:
            text, self._gap = self._gap + text, ""
            if not text.strip():
                self._gap = text
                return
        self._after_text = True
        self._add_text(text)

    def start(self, name: str) -> None:
        """A call begins; nothing else is said until its arguments are complete."""
        self._gap = ""
        self._after_text = False
        self._is_full = self._max_calls is not None and self.num_calls >= self._max_calls
        if not self._is_full:
            self._events.append(CallStarted(self.num_calls, new_call_id(), name))
            self.num_calls += 1

    def add(self, arguments: str) -> None:
        """More of the arguments of the call that was started last."""
        if not arguments or self._is_full:
            return
        index = self.num_calls - 1
        last = self._events[-1] if self._events else None
        if isinstance(last, ArgumentsPiece) and last.index == index:
            self._events[-1] = ArgumentsPiece(index, last.text + arguments)
        else:
            self._events.append(ArgumentsPiece(index, arguments))

    def finish(self) -> None:
        """The answer is over: whitespace alone is an answer, after calls it is nothing."""
        if self._gap and not self.num_calls:
            self._add_text(self._gap)
        self._gap = ""

    def drain(self) -> Sequence[AnswerEvent]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def _add_text(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, TextPiece):
            self._events[-1] = TextPiece(last.text + text)
        elif text:
            self._events.append(TextPiece(text))


def new_call_id() -> str:
    """OpenAI's form: ``call_`` and 24 characters."""
    return f"call_{secrets.token_hex(12)}"
