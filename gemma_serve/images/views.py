"""Pictures to the square views that Gemma 3's vision tower sees."""

import math
from dataclasses import replace
from typing import Literal

from PIL import Image

from gemma_serve.generation import PanAndScan, VisionInput

Detail = Literal["auto", "low", "high"]
"""OpenAI's ``image_url.detail``. ``low`` is the whole image alone. ``auto`` adds pan-and-scan crops
to images as elongated as the model's rule asks, ``high`` to all images that are large enough."""

Box = tuple[int, int, int, int]
"""Left, upper, right, lower edge in pixels; the last two are outside."""


def render_views(image: Image.Image, *, detail: Detail, vision: VisionInput) -> tuple[bytes, ...]:
    """Return the whole ``image`` (mode RGB) and its crops in ``ImagePart.views`` format.

    The bytes equal what transformers' ``Gemma3ImageProcessorPil`` has before it normalises.
    """
    whole = (0, 0, *image.size)
    crops = crop_boxes(image.size, detail, vision.pan_and_scan)
    return tuple(_render(image, box, vision.view_size) for box in (whole, *crops))


def _render(image: Image.Image, box: Box, side: int) -> bytes:
    # `resize(box=...)` would blend in pixels from outside the box.
    picture = image if box == (0, 0, *image.size) else image.crop(box)
    return picture.resize((side, side), Image.Resampling.BILINEAR).tobytes()


def crop_boxes(size: tuple[int, int], detail: Detail, rule: PanAndScan) -> list[Box]:
    """Where an image of ``size`` (width, height) is cut, along its longer side."""
    if detail == "low":
        return []
    if detail == "high":
        rule = replace(rule, min_ratio_to_activate=1.0)
    width, height = size
    if width >= height:
        return [(start, 0, end, height) for start, end in _cut(width, height, rule)]
    return [(0, start, width, end) for start, end in _cut(height, width, rule)]


def _cut(longer: int, shorter: int, rule: PanAndScan) -> list[tuple[int, int]]:
    """Cut ``longer`` into equal parts, about as long as ``shorter``; the last may be shorter."""
    ratio = longer / shorter
    if ratio < rule.min_ratio_to_activate:
        return []
    num_crops = min(math.floor(ratio + 0.5), longer // rule.min_crop_size)
    num_crops = min(max(2, num_crops), rule.max_num_crops)
    crop_size = math.ceil(longer / num_crops)
    if min(crop_size, shorter) < rule.min_crop_size:
        return []
    return [(start, min(start + crop_size, longer)) for start in range(0, longer, crop_size)]
