"""Images from the web, fetched on behalf of strangers: nothing internal may be reached."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

import httpx

from gemma_serve import __version__
from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.addresses import IPAddress, Resolve, is_public, resolve_host
from gemma_serve.images.limits import ImageLimits

logger = logging.getLogger(__name__)

_HEADERS: Final = {
    "Accept": "image/png, image/jpeg, image/webp, image/gif",
    # Without compression the bytes read are the bytes held: no gzip bombs.
    "Accept-Encoding": "identity",
    "User-Agent": f"gemma-serve/{__version__}",
}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class ImageFetcher:
    """Reads image URLs within ``ImageLimits``.

    Every hop is resolved once, all its addresses are checked, and the connection goes to one of
    the checked addresses: a DNS server that answers differently the second time is not asked. A
    bare transport is used instead of a client: it knows no proxies, and keeps no cookies that one
    user's fetch would hand to the next.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        resolve: Resolve = resolve_host,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._limits = limits
        self._schemes = ("https", "http") if limits.allow_http else ("https",)
        listed = " or ".join(f"{scheme}:" for scheme in ("data", *self._schemes))
        self._expected = f"an image URL must start with {listed}"
        self._resolve = resolve
        self._transport = transport or httpx.AsyncHTTPTransport(
            # Pooled connections are known by address alone, and one address serves many hosts: a
            # connection whose certificate was checked for one must not be reused for another.
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=0),
        )

    async def fetch(self, url: str) -> bytes:
        """Return the body behind ``url``. Raises ``InvalidRequestError`` for whatever goes wrong.

        The messages do not say whether a host has no address, or one that is refused, or what an
        internal port answers.
        """
        try:
            async with asyncio.timeout(self._limits.fetch_timeout_s):
                return await self._follow(self._parse(url))
        except TimeoutError:
            raise InvalidRequestError(
                f"the image URL did not answer in full within {self._limits.fetch_timeout_s:g} s"
            ) from None

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            async with aclosing(await self._get(url)) as response:
                if response.status_code not in _REDIRECTS:
                    return await self._read_body(response)
                location = response.headers.get("location", "")
            url = self._parse(location, base=url)
        raise InvalidRequestError(
            f"the image URL redirects more than {self._limits.max_redirects} times"
        )

    def _parse(self, text: str, *, base: httpx.URL | None = None) -> httpx.URL:
        try:
            url = base.join(text) if base else httpx.URL(text)
        except (httpx.InvalidURL, ValueError):  # lone surrogates are a ValueError
            raise InvalidRequestError(f"the image URL is malformed; {self._expected}") from None
        if url.scheme not in self._schemes:
            got = f"{url.scheme[:20]}:" if url.scheme else "no scheme"
            raise InvalidRequestError(f"{self._expected}, got {got}")
        if url.port is not None and not 0 < url.port < 2**16:
            raise InvalidRequestError(f"the image URL's port must be 1 to 65535, got {url.port}")
        if url.userinfo:
            raise InvalidRequestError("the image URL must not hold a user name or password")
        return url

    async def _get(self, url: httpx.URL) -> httpx.Response:
        addresses = await self._checked_addresses(url)
        # Each address gets its share, so that one that swallows packets leaves time for the next.
        timeout = httpx.Timeout(None, connect=self._limits.fetch_timeout_s / len(addresses))
        for address in addresses:
            request = httpx.Request(
                "GET",
                url.copy_with(host=str(address)),
                headers=_HEADERS | {"Host": url.netloc.decode("ascii")},
                extensions={
                    "sni_hostname": url.raw_host.decode("ascii"),
                    "timeout": timeout.as_dict(),
                },
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                logger.debug("cannot connect for an image: %r", error)
            except httpx.TransportError as error:
                raise _broken_connection(error) from None
        raise _broken_connection()

    async def _checked_addresses(self, url: httpx.URL) -> Sequence[IPAddress]:
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"))
        except (OSError, ValueError):  # an impossible name is a UnicodeError
            addresses = ()
        allowed = self._limits.allow_private_addresses or all(map(is_public, addresses))
        if not addresses or not allowed:
            raise InvalidRequestError("the image URL's host is unknown or has no public address")
        return addresses

    async def _read_body(self, response: httpx.Response) -> bytes:
        if response.status_code != 200:
            raise InvalidRequestError(
                f"the image URL's server answered with status {response.status_code}"
            )
        max_bytes = self._limits.max_bytes
        body = bytearray()
        try:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise InvalidRequestError(
                        f"the image has more than {max_bytes} bytes, which is the most allowed"
                    )
        except httpx.TransportError as error:
            raise _broken_connection(error) from None
        return bytes(body)


def _broken_connection(error: Exception | None = None) -> InvalidRequestError:
    if error is not None:
        logger.debug("cannot read an image: %r", error)
    return InvalidRequestError("the image URL could not be fetched: the connection failed")
