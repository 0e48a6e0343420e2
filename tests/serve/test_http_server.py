"""The HTTP server of a front end that listens itself; no cluster needed."""

import asyncio
import socket

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from deployments.http_server import HttpServer
from deployments.ports import bind_shared, require_unused
from gemma_serve.errors import ConfigurationError, UnavailableError
from tests.serve.conftest import free_port


class SlowApp:
    """Answers once it may."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.has_shut_down = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.has_shut_down = True
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.is_asked.set()
        await self.may_answer.wait()
        assert not self.has_shut_down
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


async def test_one_that_closes_finishes_its_answers_and_takes_no_more() -> None:
    app, url = SlowApp(), f"http://127.0.0.1:{(port := free_port())}/"
    server = HttpServer(app, "127.0.0.1", port)
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=5)) as client:
        answer = asyncio.create_task(client.get(url))
        await app.is_asked.wait()
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0)
        server.check_health()
        app.may_answer.set()
        assert (await answer).text == "done"
        await closing
    assert app.has_shut_down
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(url)
    with pytest.raises(UnavailableError):
        server.check_health()


async def test_port_that_somebody_else_has_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen at 127.0.0.1:{port}: Address"):
            HttpServer(SlowApp(), "127.0.0.1", port)


async def test_front_ends_share_a_port_and_another_server_is_refused() -> None:
    """The second of two servers once got half of the first one's connections, in silence."""
    app, port = SlowApp(), free_port()
    require_unused("127.0.0.1", port)
    server = HttpServer(app, "127.0.0.1", port)
    app.may_answer.set()
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=5)) as client:
        await client.get(f"http://127.0.0.1:{port}/")  # it listens
    bind_shared("127.0.0.1", port).close()
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ConfigurationError, match=f"port {port} is in use"):
            require_unused(host, port)
    await server.close()
    require_unused("127.0.0.1", port)
