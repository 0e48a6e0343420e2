"""A chat as the prompt builder sees it: roles, and parts of text and images."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """Who speaks. OpenAI's ``developer`` is read as ``SYSTEM``, its ``function`` as ``TOOL``."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text exactly as the client wrote it."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One image as the vision tower will see it.

    ``views``: the whole image first, then its pan-and-scan crops, if any. A view is ``size * size *
    3`` bytes, RGB, row-major, already resized to ``VisionInput.view_size``.
    """

    views: tuple[bytes, ...]


ContentPart = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call in an assistant message; ``arguments`` is a JSON string, as on the wire."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: str | None = None
    """A JSON Schema of the arguments, as JSON text; ``None``: it takes no arguments."""


PromptedToolForm = Literal["json", "pythonic"]
"""How prompts ask for calls and show earlier ones. Answers are understood in either form."""

ToolForm = PromptedToolForm | Literal["function_gemma"]
"""The same, or the only form that a model with tokens for calls knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOffer:
    """The functions that a prompt tells the model of."""

    definitions: tuple[ToolDefinition, ...]
    form: ToolForm = "json"
    allowed: tuple[str, ...] | None = None
    """Names of those that may be called now, if not all. The prompt describes the others too, so
    that requests that differ in this only share a prefix."""
    answer_schema: str | None = None
    """A JSON Schema, as JSON text, that an answer fits if it is no call; ``None``: any text will
    do. A model that knows of calls alone would go on calling where it must write JSON."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of any legal OpenAI history, before it is fitted to Gemma's template."""

    role: Role
    parts: tuple[ContentPart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
