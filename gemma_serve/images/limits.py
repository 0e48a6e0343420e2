"""What the images of one request may cost the server, and where they may come from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """Bounds on the images of one request, and where they may come from."""

    max_images: int = 16
    """Images per request."""
    max_bytes: int = 20 * 1024 * 1024
    """Encoded bytes of one image."""
    max_pixels: int = 25_000_000
    """Width times height of one image, read from its header before anything is decoded."""
    fetch_timeout_s: float = 10.0
    """Seconds for one image URL, redirects included."""
    max_redirects: int = 3
    allow_private_addresses: bool = False
    """Fetch from loopback, private and link-local addresses too. A caller can then reach your
    internal network through this server."""
    allow_http: bool = False
    """Fetch http: URLs besides https: ones."""
