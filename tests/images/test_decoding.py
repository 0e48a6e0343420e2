import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag

from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.decoding import decode_image
from tests.images.pictures import (
    encode,
    make_picture,
    make_png_header,
    make_webp_header,
    pixels_of,
)

MAX_PIXELS = 100_000


def decode(encoded: bytes) -> Image.Image:
    return decode_image(encoded, max_pixels=MAX_PIXELS)


def refusal(encoded: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode(encoded)
    return str(caught.value)


def encode_with_orientation(picture: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTag.Orientation] = orientation
    return encode(picture, exif=exif)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_lossless_formats_keep_every_pixel(image_format: str) -> None:
    picture = make_picture(13, 7)
    encoded = encode(picture, image_format, lossless=True)
    assert pixels_of(decode(encoded)) == pixels_of(picture)


@pytest.mark.parametrize("image_format", ["JPEG", "GIF"])
def test_lossy_formats_equal_pillow(image_format: str) -> None:
    encoded = encode(make_picture(13, 7), image_format)
    assert pixels_of(decode(encoded)) == pixels_of(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animation_is_its_first_frame(image_format: str) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    encoded = encode(red, image_format, save_all=True, append_images=[blue], lossless=True)
    assert pixels_of(decode(encoded)) == pixels_of(red)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_exif_orientation_is_applied(orientation: int, mode: str) -> None:
    encoded = encode_with_orientation(make_picture(5, 3, mode), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert pixels_of(decode(encoded)) == pixels_of(upright)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_exif_orientation_is_ignored(orientation: int) -> None:
    picture = make_picture(5, 3)
    decoded = decode(encode_with_orientation(picture, orientation))
    assert pixels_of(decoded) == pixels_of(picture)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"not exif"])
def test_damaged_exif_is_ignored(exif: bytes) -> None:
    picture = make_picture(5, 3)
    assert pixels_of(decode(encode(picture, exif=exif))) == pixels_of(picture)


def test_transparency_becomes_white() -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 128))
    assert np.asarray(decode(encode(picture))).tolist() == [[[255, 255, 255], [127, 127, 127]]]


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_tiny_and_extremely_long_images_are_read(size: tuple[int, int]) -> None:
    assert decode(encode(make_picture(*size))).size == size


def test_as_many_pixels_as_allowed_are_read() -> None:
    assert decode(encode(Image.new("L", (1000, 100)))).size == (1000, 100)


@pytest.mark.parametrize(
    ("encoded", "claim"),
    [
        (encode(Image.new("L", (1001, 100))), "1001 x 100"),
        (make_png_header(50_000, 50_000), "50000 x 50000"),
        (make_png_header(10_000, 9_000), "10000 x 9000"),  # Pillow alone would warn
        (make_webp_header(16_383, 16_383), "16383 x 16383"),
        (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;", "65535 x 65535"),
    ],
    ids=["one row too many", "png bomb", "png below pillow's limit", "webp bomb", "gif bomb"],
)
def test_too_many_pixels_are_refused_before_decoding(encoded: bytes, claim: str) -> None:
    """sglang#17269, vllm#57157: a PNG of 100 megapixels."""
    assert refusal(encoded) == f"the image has {claim} pixels, at most 100000 are allowed"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_image_is_refused(image_format: str, share: float) -> None:
    encoded = encode(make_picture(64, 64), image_format)
    assert "the image" in refusal(encoded[: int(len(encoded) * share)])


@pytest.mark.parametrize("image_format", ["BMP", "TIFF", "ICO", "PPM", "PDF"])
def test_other_formats_are_refused(image_format: str) -> None:
    encoded = encode(make_picture(16, 16), image_format)
    assert refusal(encoded) == "the image is not a PNG, JPEG, WebP or GIF file"


@pytest.mark.parametrize("encoded", [b"", b"\0", b"<svg/>", b"<html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(encoded: bytes) -> None:
    assert refusal(encoded) == "the image is not a PNG, JPEG, WebP or GIF file"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.filterwarnings("ignore")  # Pillow's own, about what is odd in a file
def test_damaged_bytes_give_an_image_or_a_refusal(image_format: str) -> None:
    random = np.random.default_rng(0)
    intact = np.frombuffer(encode(make_picture(24, 24), image_format), dtype=np.uint8)
    for _ in range(200):
        damaged = intact.copy()
        places = random.integers(0, len(intact), 3)
        damaged[places] = random.integers(0, 256, 3, dtype=np.uint8)
        try:
            assert decode(damaged.tobytes()).mode == "RGB"
        except InvalidRequestError as error:
            assert str(error).startswith("the image")  # noqa: PT017 (either outcome is right)
