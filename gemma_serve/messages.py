"""A chat as the prompt builder sees it: roles, and parts of text and images."""

from dataclasses import dataclass
from enum import StrEnum


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
class ChatMessage:
    """One message of any legal OpenAI history, before it is fitted to Gemma's template."""

    role: Role
    parts: tuple[ContentPart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
