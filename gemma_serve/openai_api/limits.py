"""What one HTTP request may cost the server."""

from dataclasses import dataclass, field

from gemma_serve.images.limits import ImageLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Bounds on one HTTP request."""

    max_body_bytes: int = 64 * 1024 * 1024
    """Larger bodies get a 413."""
    images: ImageLimits = field(default_factory=ImageLimits)
