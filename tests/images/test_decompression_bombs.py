"""A small file that would cost much time or memory is refused, or costs little.

The times in the docstrings are those of 20 MB, the largest file, on a thread that decodes for all.
"""

import struct
import zlib

import pytest
from PIL import Image

from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.decoding import decode_image
from tests.images.pictures import encode, make_picture

PNG = encode(make_picture(8, 8))
JPEG = encode(make_picture(8, 8), "JPEG")
PNG_DATA = PNG.index(b"IDAT") - 4
NUM_PIECES = 100_000
GIF_HEADER = b"GIF89a\x08\0\x08\0\x80\0\0" + bytes(6)
GIF_FRAME = b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def in_png(*chunks: bytes) -> bytes:
    return PNG[:PNG_DATA] + b"".join(chunks) + PNG[PNG_DATA:]


def in_jpeg(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def in_gif(blocks: bytes) -> bytes:
    return GIF_HEADER + blocks + GIF_FRAME


def refusal(encoded: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode_image(encoded, max_pixels=100_000)
    return str(caught.value)


@pytest.mark.parametrize(
    "encoded",
    [
        in_jpeg(b"\xff\xe5\0\x02" * NUM_PIECES),
        in_jpeg(b"\xff\xfe\0\x03a" * NUM_PIECES),
        in_jpeg(b"\xff" * NUM_PIECES),
        in_png(chunk(b"IDAT") * NUM_PIECES),
        in_png(chunk(b"abCd") * NUM_PIECES),
        in_png(chunk(b"tEXt", b"a\0b") * NUM_PIECES),
        PNG[:-12] + chunk(b"abCd") * NUM_PIECES + PNG[-12:],
        in_gif(b"\x21\xfe" + b"\x01a" * NUM_PIECES + b"\0"),
        in_gif(b"\x21\xff" + b"\x01a" * NUM_PIECES + b"\0"),
        in_gif(b"\x01" * NUM_PIECES),
    ],
    ids=[
        "jpeg segments",
        "jpeg comments",
        "jpeg fill bytes",
        "png data chunks",
        "png unknown chunks",
        "png texts",
        "png chunks after the data",
        "gif comment",
        "gif extension",
        "gif stray bytes",
    ],
)
def test_file_of_tiny_pieces_is_refused(encoded: bytes) -> None:
    """Pillow loops over them in Python: 17 s of segments, 25 s of fill bytes, 10 s of chunks."""
    assert refusal(encoded) == "the image file is made of too many small pieces"


def test_jpeg_of_endless_scans_is_refused() -> None:
    """Each scan of 64 bytes is a pass over all pixels: hours for 25 million of them."""
    encoded = encode(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last_scan = encoded[encoded.rindex(b"\xff\xc4") : -2]
    repeated = encoded[:-2] + last_scan * 100 + encoded[-2:]
    assert refusal(repeated) == "the JPEG file has more than 100 scans"


def test_progressive_jpeg_of_an_ordinary_encoder_is_read() -> None:
    encoded = encode(make_picture(64, 64), "JPEG", progressive=True)
    assert encoded.count(b"\xff\xda") > 5
    assert decode_image(encoded, max_pixels=100_000).size == (64, 64)


def test_png_in_chunks_of_a_kilobyte_is_read() -> None:
    picture = make_picture(1000, 1000)
    data = zlib.compress(
        b"".join(b"\0" + picture.crop((0, y, 1000, y + 1)).tobytes() for y in range(1000)), 0
    )
    header = struct.pack(">IIBBBBB", 1000, 1000, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IDAT", data[i : i + 1024]) for i in range(0, len(data), 1024)]
    encoded = PNG[:8] + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND")
    assert decode_image(encoded, max_pixels=1_000_000).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000))),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000))),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(100_000_000))),
    ],
    ids=["text", "colour profile", "international text"],
)
def test_compressed_metadata_is_not_inflated_without_end(bomb: bytes) -> None:
    """A hundred megabytes from a hundred kilobytes, beside a picture of 64 pixels."""
    try:
        assert decode_image(in_png(bomb), max_pixels=100_000).size == (8, 8)
    except InvalidRequestError as error:
        assert str(error) == "the image's header is damaged"  # noqa: PT017 (either is right)


def test_more_data_than_pixels_is_left_compressed() -> None:
    end = PNG_DATA + 12 + int.from_bytes(PNG[PNG_DATA : PNG_DATA + 4])
    data = zlib.decompress(PNG[PNG_DATA + 8 : end - 4]) + bytes(100_000_000)
    encoded = PNG[:PNG_DATA] + chunk(b"IDAT", zlib.compress(data)) + PNG[end:]
    assert decode_image(encoded, max_pixels=64).size == (8, 8)


def test_frame_that_outgrows_its_canvas_counts_with_its_own_size() -> None:
    frame = b",\0\0\0\0" + struct.pack("<HH", 60_000, 60_000) + b"\0\x02\x02D\x01\0;"
    assert refusal(GIF_HEADER + frame) == (
        "the image has 60000 x 60000 pixels, at most 100000 are allowed"
    )
