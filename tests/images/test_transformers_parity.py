"""Our views against transformers' own Gemma 3 image processor, byte for byte."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from gemma_serve.generation import VisionInput
from gemma_serve.images.decoding import decode_image
from gemma_serve.images.views import Detail, render_views
from tests.images.pictures import encode, make_picture


def expected_views(encoded: bytes, *, side: int, pan_and_scan: bool) -> tuple[bytes, ...]:
    processor = Gemma3ImageProcessorPil(
        size={"height": side, "width": side},
        do_pan_and_scan=pan_and_scan,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    image = Image.open(io.BytesIO(encoded))
    normalised = processor(images=[image], return_tensors="np")["pixel_values"]
    pixels = np.rint((normalised * 0.5 + 0.5) * 255).astype(np.uint8)  # [num_views, 3, side, side]
    return tuple(view.transpose(1, 2, 0).tobytes() for view in pixels)


def our_views(encoded: bytes, *, side: int, detail: Detail) -> tuple[bytes, ...]:
    image = decode_image(encoded, max_pixels=10**8)
    return render_views(image, detail=detail, vision=VisionInput(side, 256))


@pytest.mark.parametrize("size", [(896, 896), (1, 1), (1, 10_000), (640, 481), (1500, 1000)])
def test_whole_image_equals_transformers(size: tuple[int, int]) -> None:
    encoded = encode(make_picture(*size))
    assert our_views(encoded, side=896, detail="low") == expected_views(
        encoded, side=896, pan_and_scan=False
    )


@pytest.mark.parametrize(
    ("size", "num_crops"),
    [
        ((1000, 500), 2),
        ((500, 1001), 2),
        ((1000, 333), 3),
        ((1400, 300), 4),
        ((300, 2000), 4),
        ((307, 256), 0),
        ((599, 500), 0),
        ((600, 500), 2),
        ((1200, 255), 0),
        ((500, 500), 0),
    ],
)
def test_pan_and_scan_crops_equal_transformers(size: tuple[int, int], num_crops: int) -> None:
    encoded = encode(make_picture(*size, seed=1))
    views = our_views(encoded, side=64, detail="auto")
    assert len(views) == 1 + num_crops
    assert views == expected_views(encoded, side=64, pan_and_scan=True)


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("L", "JPEG"),
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("L", "GIF"),
        ("P", "GIF"),
        ("RGBA", "GIF"),
    ],
)
def test_every_pixel_format_equals_transformers(mode: str, image_format: str) -> None:
    encoded = encode(make_picture(40, 30, mode), image_format)
    assert our_views(encoded, side=32, detail="low") == expected_views(
        encoded, side=32, pan_and_scan=False
    )


@pytest.mark.parametrize("transparency", [7, bytes(range(256))])
def test_transparent_palette_equals_transformers(transparency: int | bytes) -> None:
    encoded = encode(make_picture(40, 30, "P"), transparency=transparency)
    assert our_views(encoded, side=32, detail="low") == expected_views(
        encoded, side=32, pan_and_scan=False
    )


def test_transparent_colour_equals_transformers() -> None:
    picture = make_picture(40, 30)
    picture.paste((1, 2, 3), (0, 0, 20, 30))
    encoded = encode(picture, transparency=(1, 2, 3))
    assert our_views(encoded, side=32, detail="low") == expected_views(
        encoded, side=32, pan_and_scan=False
    )
