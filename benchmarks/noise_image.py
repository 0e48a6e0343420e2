"""Pictures that no cache has seen."""

import base64
import io
import random
from typing import Final

from PIL import Image

_GRAIN: Final = 64
_SIDE: Final = 896
"""Pixels: the size that Gemma 3 looks at."""


def noise_image_url(name: str) -> str:
    """A data URL of a JPEG that ``name`` determines."""
    pixels = random.Random(name).randbytes(_GRAIN * _GRAIN * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (_GRAIN, _GRAIN), pixels).resize((_SIDE, _SIDE)).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
