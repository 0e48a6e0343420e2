import pytest
from PIL import Image

from gemma_serve.generation import PanAndScan, VisionInput
from gemma_serve.images.views import Box, Detail, crop_boxes, render_views
from tests.images.pictures import make_picture

RULE = PanAndScan(min_crop_size=256, max_num_crops=4, min_ratio_to_activate=1.2)


@pytest.mark.parametrize(
    ("size", "detail", "expected"),
    [
        ((1000, 500), "low", []),
        ((1000, 500), "auto", [(0, 0, 500, 500), (500, 0, 1000, 500)]),
        ((500, 1000), "auto", [(0, 0, 500, 500), (0, 500, 500, 1000)]),
        ((1000, 1000), "auto", []),
        ((1199, 1000), "auto", []),
        ((1200, 1000), "auto", [(0, 0, 600, 1000), (600, 0, 1200, 1000)]),
        ((1001, 400), "auto", [(0, 0, 334, 400), (334, 0, 668, 400), (668, 0, 1001, 400)]),
        ((1000, 1000), "high", [(0, 0, 500, 1000), (500, 0, 1000, 1000)]),
        ((1000, 1001), "high", [(0, 0, 1000, 501), (0, 501, 1000, 1001)]),
        ((511, 511), "high", [(0, 0, 256, 511), (256, 0, 511, 511)]),
        ((510, 510), "high", []),
        ((10_000, 255), "high", []),
        ((1, 1), "high", []),
    ],
)
def test_crop_boxes(size: tuple[int, int], detail: Detail, expected: list[Box]) -> None:
    assert crop_boxes(size, detail, RULE) == expected


def test_no_more_crops_than_the_rule_allows() -> None:
    assert len(crop_boxes((9000, 300), "auto", RULE)) == 4


def test_view_is_resized_without_regard_to_aspect() -> None:
    stripes = Image.new("RGB", (4, 2), (10, 20, 30))
    views = render_views(stripes, detail="low", vision=VisionInput(2, 1))
    assert views == (bytes([10, 20, 30] * 4),)


def test_whole_image_comes_before_its_crops() -> None:
    picture = Image.new("RGB", (600, 300), "red")
    picture.paste("blue", (300, 0, 600, 300))
    whole, left, right = render_views(picture, detail="auto", vision=VisionInput(2, 1))
    assert whole == render_views(picture, detail="low", vision=VisionInput(2, 1))[0]
    assert (left, right) == (b"\xff\0\0" * 4, b"\0\0\xff" * 4)


def test_crop_does_not_see_its_neighbour() -> None:
    picture = make_picture(600, 300)
    vision = VisionInput(64, 1)
    left = render_views(picture.crop((0, 0, 300, 300)), detail="low", vision=vision)
    assert render_views(picture, detail="auto", vision=vision)[1] == left[0]
