import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import VisionInput
from gemma_serve.images.limits import ImageLimits
from gemma_serve.images.loader import ImageLoader
from gemma_serve.images.views import Detail
from gemma_serve.messages import ImagePart
from tests.images.pictures import data_url, encode, make_picture, make_png_header
from tests.images.web import reply, serve

VISION = VisionInput(view_size=8, tokens_per_view=4)
PARAM = "messages[0].content[1].image_url.url"
LIMITS = ImageLimits(
    max_bytes=5_000_000, max_pixels=2_000_000, allow_http=True, allow_private_addresses=True
)
PNG = encode(make_picture(8, 8))
JPEG = encode(make_picture(64, 64), "JPEG")


@pytest.fixture
async def loader() -> AsyncIterator[ImageLoader]:
    loader = ImageLoader(LIMITS)
    yield loader
    await loader.aclose()


async def load(loader: ImageLoader, url: str, detail: Detail = "auto") -> ImagePart:
    return await loader.load(url, detail=detail, vision=VISION, param=PARAM)


async def test_data_url_becomes_a_view(loader: ImageLoader) -> None:
    assert await load(loader, data_url(PNG)) == ImagePart((make_picture(8, 8).tobytes(),))


async def test_content_decides_and_not_the_media_type(loader: ImageLoader) -> None:
    assert await load(loader, data_url(PNG, "text/html")) == await load(loader, data_url(PNG))


async def test_fetched_image_equals_the_same_data_url(loader: ImageLoader) -> None:
    async with serve({"/": reply(JPEG, headers={"Content-Type": "text/plain"})}) as web:
        assert await load(loader, f" {web.url('/')}\n") == await load(loader, data_url(JPEG))


@pytest.mark.parametrize(("detail", "num_views"), [("low", 1), ("auto", 1), ("high", 3)])
async def test_detail_decides_on_crops(loader: ImageLoader, detail: Detail, num_views: int) -> None:
    url = data_url(encode(make_picture(600, 600)))
    assert [len(view) for view in (await load(loader, url, detail)).views] == [192] * num_views


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        "\0",
        "\ud800",
        "cat.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://127.0.0.1/cat.png",
        "blob:https://example.com/1",
        "javascript:alert(1)",
        "https:",
        "https://",
        "https://[",
        "http://user:password@127.0.0.1/",
        "data:",
        "data:,",
        "data:image/png;base64,",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,\ud800",
        "data:image/png," + "A" * 16,
        PNG.hex(),
        data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        data_url(b"<html>not found</html>"),
        data_url(PNG[:20]),
        data_url(PNG[:-40]),
        data_url(PNG[:8] + bytes(100)),
        data_url(JPEG[:3]),
        data_url(JPEG[: len(JPEG) // 2]),
        data_url(JPEG[:4] + bytes(1000)),
        data_url(b"GIF89a"),
        data_url(b"RIFF\0\0\0\0WEBPVP8 "),
        data_url(make_png_header(50_000, 50_000)),
        data_url(make_png_header(8, 8)),
        data_url(make_png_header(0, 0)),
        data_url(PNG + bytes(5_000_000)),
    ],
)
async def test_malformed_input_names_the_field_and_the_next_image_works(
    loader: ImageLoader, url: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await load(loader, url)
    assert caught.value.param == PARAM
    assert len(str(caught.value)) < 150
    assert await load(loader, data_url(PNG))


async def test_web_page_instead_of_an_image_is_refused(loader: ImageLoader) -> None:
    async with serve({"/": reply(b"<html></html>", headers={"Content-Type": "image/png"})}) as web:
        with pytest.raises(InvalidRequestError) as caught:
            await load(loader, web.url("/"))
    assert str(caught.value) == "the image is not a PNG, JPEG, WebP or GIF file"


async def test_event_loop_goes_on_while_an_image_is_decoded(loader: ImageLoader) -> None:
    task = asyncio.create_task(load(loader, data_url(PNG)))
    await asyncio.sleep(0)  # all that the task does on the loop until it waits
    assert not task.done()
    assert await task == ImagePart((make_picture(8, 8).tobytes(),))


async def test_number_of_decoding_threads_is_bounded(loader: ImageLoader) -> None:
    before = set(threading.enumerate())
    await asyncio.gather(*(load(loader, data_url(PNG)) for _ in range(20)))
    assert len(set(threading.enumerate()) - before) <= 2


async def test_cancelled_load_leaves_the_loader_usable(loader: ImageLoader) -> None:
    loads = [asyncio.create_task(load(loader, data_url(PNG))) for _ in range(5)]
    await asyncio.sleep(0)
    for task in loads:
        task.cancel()
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 5
    assert await load(loader, data_url(PNG))
