"""What a parser makes of an answer, piece by piece."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Some of what the model says to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The model calls a function that it was offered."""

    index: int
    """Which of the answer's calls, from 0."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """Some of a call's arguments; all of its pieces joined are a JSON object."""

    index: int
    text: str


AnswerEvent = TextPiece | CallStarted | ArgumentsPiece
