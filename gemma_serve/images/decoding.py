"""Encoded images to RGB pixels, with every limit checked before memory is spent."""

import logging
from io import BytesIO
from typing import Final

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile

from gemma_serve.errors import InvalidRequestError

logger = logging.getLogger(__name__)

# Pillow's own limit warns or raises at fixed sizes; ours is checked on every image right after its
# header was read. (WebP's canvas is reserved by then, but none of its pages are touched.)
Image.MAX_IMAGE_PIXELS = None

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
# EXIF 2.32, 4.6.4 A: what brings an image of that orientation upright.
_UPRIGHT: Final = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


# 20 MB in pieces of 1 KB, each read with its header and its checksum; Pillow takes half a second.
_MAX_READS: Final = 100_000
# Encoders write ten; each costs a pass over all pixels (30 ms for 25 million), however empty it is.
_MAX_JPEG_SCANS: Final = 100
_JPEG_START_OF_SCAN: Final = b"\xff\xda"


class _MeteredFile(BytesIO):
    """Ends Pillow's Python loops over segments, chunks and stray bytes of a file made of them."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__(encoded)
        self._num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_reads += 1
        if self._num_reads > _MAX_READS:
            raise InvalidRequestError("the image file is made of too many small pieces")
        return super().read(size)


def decode_image(encoded: bytes, *, max_pixels: int) -> Image.Image:
    """Return the (first) picture in ``encoded``: upright, mode RGB, transparency made white."""
    image = _open(encoded)
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidRequestError(
            f"the image has {width} x {height} pixels, at most {max_pixels} are allowed"
        )
    image_format = image.format
    if isinstance(image, JpegImageFile) and encoded.count(_JPEG_START_OF_SCAN) > _MAX_JPEG_SCANS:
        raise InvalidRequestError(f"the JPEG file has more than {_MAX_JPEG_SCANS} scans")
    try:
        image.load()
        image = _turn_upright(image)  # large images are not kept longer than needed
        return _convert_to_rgb(image)
    except InvalidRequestError:
        raise
    except Exception as error:  # Pillow raises whatever malformed bytes lead it into
        logger.debug("cannot decode an image", exc_info=True)
        raise InvalidRequestError(
            f"the image is not a complete and valid {image_format} file"
        ) from error


def _open(encoded: bytes) -> Image.Image:
    try:
        return Image.open(_MeteredFile(encoded), formats=_FORMATS)
    except InvalidRequestError:
        raise
    except UnidentifiedImageError:
        raise InvalidRequestError("the image is not a PNG, JPEG, WebP or GIF file") from None
    except Exception as error:  # as above
        logger.debug("cannot open an image", exc_info=True)
        raise InvalidRequestError("the image's header is damaged") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTag.Orientation)
    except Exception:  # damaged metadata does not spoil the picture
        logger.debug("cannot read an image's EXIF data", exc_info=True)
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert as transformers' image processors do, which put transparency on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    opaque = Image.alpha_composite(white, transparent)
    del white, transparent
    return opaque.convert("RGB")
