"""Builders of small pictures, whole and broken."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image


def make_picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a picture of random pixels, transparency included where ``mode`` has it."""
    num_channels = len(Image.new(mode, (1, 1)).getbands())
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, (height, width), dtype=np.uint16))
    pixels = random.integers(0, 256, height * width * num_channels, dtype=np.uint8)
    if mode == "1":
        return Image.frombytes("L", (width, height), pixels.tobytes()).convert("1")
    picture = Image.frombytes(mode, (width, height), pixels.tobytes())
    if mode == "P":
        picture.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return picture


def encode(picture: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """Return ``picture`` as a file; ``options`` are Pillow's."""
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def pixels_of(picture: Image.Image) -> tuple[tuple[int, int], bytes]:
    """Return what must be equal for two RGB pictures to look the same."""
    return picture.size, picture.convert("RGB").tobytes()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def make_png_header(width: int, height: int) -> bytes:
    """Return a complete PNG file that claims a size, but holds one byte of pixels."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"\0")),
            (b"IEND", b""),
        )
    )


def make_webp_header(width: int, height: int) -> bytes:
    """Return a WebP file whose canvas claims a size, with one 8 x 8 picture in it."""
    picture = encode(make_picture(8, 8, "RGBA"), "WEBP", lossless=True)[12:]
    canvas = b"\x12\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunks = b"VP8X" + struct.pack("<I", len(canvas)) + canvas + _frame(picture)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _frame(picture: bytes) -> bytes:
    animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    header = bytes(6) + struct.pack("<I", 7)[:3] * 2 + struct.pack("<I", 1)[:3] + b"\0"
    body = header + picture
    return animation + b"ANMF" + struct.pack("<I", len(body)) + body
