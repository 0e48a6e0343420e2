"""How FunctionGemma is told of functions, and how it sees earlier calls and their results.

The format is Google's (ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices):
names and punctuation as text, every string between two ``<escape>`` tokens, members in the order of
their names. The tokens are meant as such only where this module puts them; in what clients write
they are text.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gemma_serve.messages import ContentPart, TextPart, ToolCall, ToolDefinition, ToolOffer
from gemma_serve.tool_calling.function_gemma import END, ESCAPE, START
from gemma_serve.tool_calling.function_gemma_schema import declared_schema

START_DECLARATION: Final = "<start_function_declaration>"
END_DECLARATION: Final = "<end_function_declaration>"
START_RESPONSE: Final = "<start_function_response>"
END_RESPONSE: Final = "<end_function_response>"

TRIGGER: Final = "You are a model that can do function calling with the following functions"
"""What switches FunctionGemma from talking to calling."""

_MAX_DEPTH: Final = 64
"""Of arguments and results; what is nested deeper is told as text."""


@dataclass(frozen=True, slots=True)
class ControlPart:
    """A control token that is meant as one: the server's own, never a client's."""

    token: str


PromptPart = ContentPart | ControlPart


def developer_parts(said: Sequence[PromptPart], offer: ToolOffer) -> tuple[PromptPart, ...]:
    """The first turn: ``said``, the chat's instructions, then the functions that may be called."""
    text = "".join(part.text for part in said if isinstance(part, TextPart))
    if TRIGGER not in text:
        text = f"{text}\n{TRIGGER}" if text else TRIGGER
    names = offer.allowed or [tool.name for tool in offer.definitions]
    tools = [tool for tool in offer.definitions if tool.name in names]
    return (TextPart(text), *(part for tool in tools for part in _declaration(tool)))


def call_parts(call: ToolCall) -> tuple[PromptPart, ...]:
    """An earlier call, as the model wrote it."""
    members = _members_of(call.arguments.strip() or "{}")
    return (
        ControlPart(START),
        *_joined([f"call:{call.name}", *_written(members)]),
        ControlPart(END),
    )


def response_parts(name: str, result: str) -> tuple[PromptPart, ...]:
    """The result of a call of the function ``name``, which the model reads in its own turn."""
    text = _joined([f"response:{name}", *_written(_members_of(result))])
    return (ControlPart(START_RESPONSE), *text, ControlPart(END_RESPONSE))


def _declaration(tool: ToolDefinition) -> tuple[PromptPart, ...]:
    members: dict[str, object] = {"description": tool.description or ""}
    if tool.parameters is not None:
        members["parameters"] = declared_schema(json.loads(tool.parameters))
    text = _joined([f"declaration:{tool.name}", *_written(members)])
    return (ControlPart(START_DECLARATION), *text, ControlPart(END_DECLARATION))


def _members_of(text: str) -> Mapping[str, object]:
    """A JSON object's members; anything else is one member, as the format knows only those."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if _is_deep(value):
        value = text
    return value if isinstance(value, dict) else {"value": value}


def _is_deep(value: object) -> bool:
    """Whether writing it, which is recursive, could take too many levels."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _parts_of(outer)]
    return bool(level)


def _parts_of(value: object) -> Collection[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _written(value: object) -> Iterable[str | ControlPart]:
    match value:
        case str():
            yield from (ControlPart(ESCAPE), value, ControlPart(ESCAPE))
        case Mapping():
            yield "{"
            for index, (key, inner) in enumerate(sorted(value.items())):
                yield f"{',' if index else ''}{key}:"
                yield from _written(inner)
            yield "}"
        case list():
            yield "["
            for index, inner in enumerate(value):
                yield "," if index else ""
                yield from _written(inner)
            yield "]"
        case _:
            yield json.dumps(value)


def _joined(pieces: Iterable[str | ControlPart]) -> tuple[PromptPart, ...]:
    """Neighbouring texts as one, so that they are tokenized as one."""
    parts: list[PromptPart] = []
    for piece in pieces:
        last = parts[-1] if parts else None
        if isinstance(piece, ControlPart):
            parts.append(piece)
        elif isinstance(last, TextPart):
            parts[-1] = TextPart(last.text + piece)
        elif piece:
            parts.append(TextPart(piece))
    return tuple(parts)
