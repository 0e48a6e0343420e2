"""Limits of a fetch, against real servers on this machine."""

from dataclasses import replace

import httpx
import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.fetching import ImageFetcher
from gemma_serve.images.limits import ImageLimits
from tests.images.web import FakeResolver, Reply, drip, never, raw, redirect, reply, serve

LOCAL = ImageLimits(
    max_bytes=10, max_redirects=2, allow_http=True, allow_private_addresses=True, fetch_timeout_s=5
)
CONNECTION_FAILED = "the image URL could not be fetched: the connection failed"


async def fetch(url: str, limits: ImageLimits = LOCAL) -> bytes:
    fetcher = ImageFetcher(limits)
    try:
        return await fetcher.fetch(url)
    finally:
        await fetcher.aclose()


async def refusal(url: str, limits: ImageLimits = LOCAL) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        await fetch(url, limits)
    return str(caught.value)


async def test_body_is_returned() -> None:
    async with serve({"/cat.png?size=1": reply(b"0123456789")}) as web:
        assert await fetch(web.url("/cat.png?size=1#top")) == b"0123456789"


@pytest.mark.parametrize(
    "too_long",
    [
        reply(b"0123456789x"),
        reply(b"0123456789x", headers={"Content-Length": ""}),
        reply(b"6\r\n012345\r\n5\r\n6789x\r\n0\r\n\r\n", headers={"Transfer-Encoding": "chunked"}),
        drip,
    ],
    ids=["content-length", "until close", "chunked", "endless"],
)
async def test_body_over_the_limit_is_refused(too_long: Reply) -> None:
    async with serve({"/": too_long}) as web:
        assert await refusal(web.url("/")) == (
            "the image has more than 10 bytes, which is the most allowed"
        )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_followed(status: int) -> None:
    async with serve({"/a": redirect("/b?c", status), "/b?c": reply(b"image")}) as web:
        assert await fetch(web.url("/a")) == b"image"


async def test_as_many_redirects_as_allowed_are_followed() -> None:
    replies = {"/1": redirect("2"), "/2": redirect("3"), "/3": reply(b"image")}
    async with serve(replies) as web:
        assert await fetch(web.url("/1")) == b"image"


async def test_redirect_loop_ends_at_the_limit() -> None:
    async with serve({"/a": redirect("/b"), "/b": redirect("/a")}) as web:
        assert await refusal(web.url("/a")) == "the image URL redirects more than 2 times"
        assert len(web.requests) == 3


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///etc/passwd", "an image URL must start with data: or https: or http:, got file:"),
        ("data:image/png;base64,AA==", "an image URL must start with data: or https: or http:, "
         "got data:"),
        ("http://user:secret@127.0.0.1/", "the image URL must not hold a user name or password"),
        ("http://[::1/", "the image URL is malformed; an image URL must start with data: or "
         "https: or http:"),
    ],
)  # fmt: skip
async def test_each_hop_is_checked_like_the_first(location: str, message: str) -> None:
    async with serve({"/": redirect(location)}) as web:
        assert await refusal(web.url("/")) == message


async def test_redirect_down_to_http_is_refused() -> None:
    requests = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(302, headers={"Location": "http://images.example/"})

    fetcher = ImageFetcher(
        ImageLimits(),
        resolve=FakeResolver(**{"images.example": [["8.8.8.8"]]}),
        transport=httpx.MockTransport(answer),
    )
    with pytest.raises(InvalidRequestError, match=r"^an image URL must start with data: or https:"):
        await fetcher.fetch("https://images.example/")
    assert len(requests) == 1


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
async def test_other_status_is_refused(status: int) -> None:
    async with serve({"/": reply(status=status)}) as web:
        assert await refusal(web.url("/")) == (
            f"the image URL's server answered with status {status}"
        )


@pytest.mark.parametrize("slow", [never, drip], ids=["silent", "one byte at a time"])
async def test_time_limit_covers_the_whole_answer(slow: Reply) -> None:
    limits = replace(LOCAL, fetch_timeout_s=0.1, max_bytes=10**9)
    async with serve({"/": slow}) as web:
        assert await refusal(web.url("/"), limits) == (
            "the image URL did not answer in full within 0.1 s"
        )


async def test_time_limit_covers_all_redirects_together() -> None:
    limits = replace(LOCAL, fetch_timeout_s=0.1, max_redirects=10**6)
    async with serve({"/": redirect("/")}) as web:
        assert await refusal(web.url("/"), limits) == (
            "the image URL did not answer in full within 0.1 s"
        )


@pytest.mark.parametrize(
    "answer",
    [b"", b"220 smtp.example ready\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"],
    ids=["nothing", "no http", "cut off"],
)
async def test_broken_answer_is_a_failed_connection(answer: bytes) -> None:
    async with serve({"/": raw(answer)}) as web:
        assert await refusal(web.url("/")) == CONNECTION_FAILED


async def test_closed_port_is_a_failed_connection() -> None:
    async with serve({}) as web:
        url = web.url("/")
    assert await refusal(url) == CONNECTION_FAILED


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/a.png", "an image URL must start with data: or https:, got http:"),
        ("ftp://example.com/a.png", "an image URL must start with data: or https:, got ftp:"),
        ("file:///etc/passwd", "an image URL must start with data: or https:, got file:"),
        ("/etc/passwd", "an image URL must start with data: or https:, got no scheme"),
        ("cat.png", "an image URL must start with data: or https:, got no scheme"),
        ("", "an image URL must start with data: or https:, got no scheme"),
        ("https://user@example.com/", "the image URL must not hold a user name or password"),
        ("https://example.com:0/", "the image URL's port must be 1 to 65535, got 0"),
        ("https://example.com:70000/", "the image URL's port must be 1 to 65535, got 70000"),
    ],
)
async def test_url_that_is_never_fetched(url: str, message: str) -> None:
    assert await refusal(url, ImageLimits()) == message


@pytest.mark.parametrize(
    "url",
    [
        "https://[::1/",
        "https://0177.0.0.1/",
        "https://a\0b/",
        "https://a:b/",
        "https://a/\ud800",
        "A" * 70_000,
    ],
    ids=["bracket", "octal", "nul", "port", "surrogate", "bare base64"],
)
async def test_malformed_url_is_refused(url: str) -> None:
    assert await refusal(url, ImageLimits()) == (
        "the image URL is malformed; an image URL must start with data: or https:"
    )


async def test_cookies_of_one_fetch_are_not_sent_with_the_next() -> None:
    async with serve({"/": reply(b"image", headers={"Set-Cookie": "user=alice"})}) as web:
        fetcher = ImageFetcher(LOCAL)
        await fetcher.fetch(web.url("/"))
        await fetcher.fetch(web.url("/"))
        await fetcher.aclose()
        assert [request for request in web.requests if "cookie" in request.lower()] == []


async def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with serve({"/": reply(b"image")}) as web:
        assert await fetch(web.url("/")) == b"image"
