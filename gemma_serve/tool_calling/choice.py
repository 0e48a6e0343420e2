"""What a request lets the model call, or makes it call."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """OpenAI's ``tool_choice``, once it allows any call at all."""

    mode: Literal["auto", "required", "named"]
    """``auto``: text or calls. ``required``: at least one call. ``named``: one call, of the only
    name."""
    names: tuple[str, ...]
    """The functions that may be called."""
