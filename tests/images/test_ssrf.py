"""Nobody reaches an internal service by way of an image URL."""

import httpx
import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.fetching import ImageFetcher
from gemma_serve.images.limits import ImageLimits
from tests.images.web import FakeResolver, reply, serve

REFUSED = "the image URL's host is unknown or has no public address"


class FakeWeb:
    """Serves every address. ``connections`` are the addresses that were connected to."""

    def __init__(self, *answers: httpx.Response) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._answers.pop(0)

    @property
    def connections(self) -> list[str]:
        return [request.url.host for request in self.requests]


def an_image() -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(b"image"))


def fetcher_of(web: FakeWeb, resolver: FakeResolver, **limits: bool) -> ImageFetcher:
    return ImageFetcher(ImageLimits(**limits), resolve=resolver, transport=httpx.MockTransport(web))


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://127.1/",
        "https://0x7f.1/",
        "https://2130706433/",
        "https://0/",
        "https://localhost/",
        "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]/",
        "https://[::]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[fe80::1%25lo]/",
        "https://127。0。0。1/",
        "https://a..b/",
        "https:///",
    ],
)
async def test_internal_and_unknown_hosts_get_one_and_the_same_answer(url: str) -> None:
    """vllm#57157, sglang#17269: any URL was fetched, the cloud's metadata too."""
    fetcher = ImageFetcher(ImageLimits())
    with pytest.raises(InvalidRequestError) as caught:
        await fetcher.fetch(url)
    await fetcher.aclose()
    assert str(caught.value) == REFUSED


async def test_host_without_an_address_gets_that_answer_too() -> None:
    with pytest.raises(InvalidRequestError, match=REFUSED):
        await fetcher_of(FakeWeb(), FakeResolver()).fetch("https://no-such-host.example/")


async def test_connection_goes_to_the_checked_address_under_the_hosts_name() -> None:
    web = FakeWeb(an_image())
    resolver = FakeResolver(**{"images.example": [["93.184.216.34"]]})
    fetcher = fetcher_of(web, resolver)
    assert await fetcher.fetch("https://images.example:8443/cat?a=b") == b"image"
    request = web.requests[0]
    assert str(request.url) == "https://93.184.216.34:8443/cat?a=b"
    assert request.headers["host"] == "images.example:8443"
    assert request.extensions["sni_hostname"] == "images.example"


async def test_address_that_changes_after_the_check_is_not_asked_for() -> None:
    """vllm#57157: DNS rebinding."""
    web = FakeWeb(an_image())
    resolver = FakeResolver(**{"rebind.example": [["93.184.216.34"], ["127.0.0.1"]]})
    await fetcher_of(web, resolver).fetch("https://rebind.example/")
    assert (resolver.asked, web.connections) == (["rebind.example"], ["93.184.216.34"])


async def test_host_that_turns_private_on_the_second_hop_is_refused() -> None:
    web = FakeWeb(httpx.Response(302, headers={"Location": "/again"}))
    resolver = FakeResolver(**{"rebind.example": [["93.184.216.34"], ["127.0.0.1"]]})
    with pytest.raises(InvalidRequestError, match=REFUSED):
        await fetcher_of(web, resolver).fetch("https://rebind.example/")
    assert web.connections == ["93.184.216.34"]


async def test_redirect_to_a_private_address_is_refused() -> None:
    """vllm#57157: redirects were followed unchecked."""
    web = FakeWeb(httpx.Response(302, headers={"Location": "https://metadata.example/"}))
    resolver = FakeResolver(
        **{"images.example": [["93.184.216.34"]], "metadata.example": [["169.254.169.254"]]}
    )
    with pytest.raises(InvalidRequestError, match=REFUSED):
        await fetcher_of(web, resolver).fetch("https://images.example/")
    assert web.connections == ["93.184.216.34"]


async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    web = FakeWeb()
    resolver = FakeResolver(**{"mixed.example": [["93.184.216.34", "10.0.0.1"]]})
    with pytest.raises(InvalidRequestError, match=REFUSED):
        await fetcher_of(web, resolver).fetch("https://mixed.example/")
    assert web.connections == []


async def test_private_address_is_fetched_where_the_operator_allows_it() -> None:
    web = FakeWeb(an_image())
    resolver = FakeResolver(**{"intranet": [["10.0.0.1"]]})
    fetcher = fetcher_of(web, resolver, allow_private_addresses=True)
    assert await fetcher.fetch("https://intranet/") == b"image"


async def test_real_connection_goes_to_the_resolved_address() -> None:
    limits = ImageLimits(allow_http=True, allow_private_addresses=True)
    fetcher = ImageFetcher(limits, resolve=FakeResolver(**{"images.test": [["127.0.0.1"]]}))
    async with serve({"/": reply(b"image")}) as web:
        assert await fetcher.fetch(web.url("/", host="images.test")) == b"image"
        assert f"Host: images.test:{web.port}\r\n" in web.requests[0]
    await fetcher.aclose()


async def test_next_address_is_tried_when_one_does_not_answer() -> None:
    limits = ImageLimits(allow_http=True, allow_private_addresses=True)
    resolver = FakeResolver(**{"images.test": [["::1", "127.0.0.1"]]})
    fetcher = ImageFetcher(limits, resolve=resolver)
    async with serve({"/": reply(b"image")}) as web:
        assert await fetcher.fetch(web.url("/", host="images.test")) == b"image"
    await fetcher.aclose()
