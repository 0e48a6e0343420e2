"""What one HTTP request may cost the server."""

from dataclasses import dataclass, field
from typing import Final

from gemma_serve.images.limits import ImageLimits

MAX_JSON_VALUES: Final = 500_000
"""In a body, keys not counted; read and checked in about a second."""
MAX_JSON_DEPTH: Final = 200
"""Levels of lists and objects: a fifth of what Python's stack takes."""
MAX_CONTENT_PARTS: Final = 50_000
"""Parts and tool calls over all messages. A context of 128K tokens cannot hold three times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Bounds on one HTTP request."""

    max_body_bytes: int = 64 * 1024 * 1024
    """Larger bodies get a 413."""
    body_timeout_s: float = 120.0
    """Seconds from a request's headers to the end of its body; a slower one gets a 408. Enough for
    the largest body at 5 Mbit/s."""
    images: ImageLimits = field(default_factory=ImageLimits)
