"""What the HTTP side calls to turn an ``image_url`` part into an ``ImagePart``."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import VisionInput
from gemma_serve.images.data_urls import decode_data_url
from gemma_serve.images.decoding import decode_image
from gemma_serve.images.fetching import ImageFetcher
from gemma_serve.images.limits import ImageLimits
from gemma_serve.images.views import Detail, render_views
from gemma_serve.messages import ImagePart

# Each takes up to 16 bytes per pixel: 800 MB for a transparent image of the default `max_pixels`.
_MAX_CONCURRENT_DECODES: Final = 2

T = TypeVar("T")


class ImageLoader:
    """Reads and decodes images within ``ImageLimits``, off the event loop's thread.

    The decoding threads are its own: a slow DNS server that fills asyncio's threads with look-ups
    does not keep others' images from being decoded.
    """

    def __init__(self, limits: ImageLimits, *, fetcher: ImageFetcher | None = None) -> None:
        self._limits = limits
        self._fetcher = fetcher or ImageFetcher(limits)
        self._decoders = ThreadPoolExecutor(_MAX_CONCURRENT_DECODES, "image-decoder")

    async def load(self, url: str, *, detail: Detail, vision: VisionInput, param: str) -> ImagePart:
        """Return the image behind ``url``, a ``data:``, ``https:`` or, if allowed, ``http:`` URL.

        ``param`` is the field that every ``InvalidRequestError`` names.
        """
        try:
            encoded = await self._read(url.strip())
            return await self._in_thread(partial(self._decode, encoded, detail, vision))
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param=param) from error

    async def aclose(self) -> None:
        """Drop what still waits to be decoded and close the connections."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await self._fetcher.aclose()

    async def _read(self, url: str) -> bytes:
        if url[:5].lower() != "data:":
            return await self._fetcher.fetch(url)
        return await self._in_thread(
            partial(decode_data_url, url, max_bytes=self._limits.max_bytes)
        )

    def _decode(self, encoded: bytes, detail: Detail, vision: VisionInput) -> ImagePart:
        image = decode_image(encoded, max_pixels=self._limits.max_pixels)
        return ImagePart(render_views(image, detail=detail, vision=vision))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)
