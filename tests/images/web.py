"""A small real web server and a resolver whose answers the test decides."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address

from gemma_serve.images.addresses import IPAddress

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


def reply(
    body: bytes = b"", *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Reply:
    """Answer with ``body``; its length is given unless ``headers`` say otherwise."""
    lines = {"Content-Length": str(len(body)), "Connection": "close"} | dict(headers or {})

    async def write(writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status} Whatever\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in lines.items() if value
        )
        writer.write(head.encode("latin-1") + b"\r\n" + body)
        await writer.drain()

    return write


def redirect(location: str, status: int = 302) -> Reply:
    return reply(status=status, headers={"Location": location})


def raw(answer: bytes) -> Reply:
    """Answer with exactly these bytes."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return write


async def never(_: asyncio.StreamWriter) -> None:
    """Take the request and stay silent."""
    await asyncio.get_running_loop().create_future()


async def drip(writer: asyncio.StreamWriter) -> None:
    """Answer with one byte after another, without end."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.002)  # each byte comes well within any timeout of one read


@dataclass
class WebServer:
    """Answers each path as told. ``requests`` are the header blocks that came."""

    replies: dict[str, Reply]
    requests: list[str] = field(default_factory=list)
    port: int = 0
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    def url(self, path: str, *, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.requests.append(request)
            await self.replies[request.split()[1]](writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has left, or the test is over
        finally:
            writer.close()
            # Until the transport is closed too: the loop would drop it open at the test's end.
            with suppress(ConnectionError):
                await writer.wait_closed()
            self._connections.discard(connection)

    async def aclose(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


@asynccontextmanager
async def serve(
    replies: dict[str, Reply], *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[WebServer]:
    web = WebServer(replies)
    server = await asyncio.start_server(web.answer, "127.0.0.1", 0, ssl=tls)
    web.port = server.sockets[0].getsockname()[1]
    try:
        yield web
    finally:
        server.close()
        await web.aclose()
        await server.wait_closed()


class FakeResolver:
    """Gives each host's answers in turn, the last one for ever. ``asked`` are the hosts."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {host: list(sequence) for host, sequence in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> tuple[IPAddress, ...]:
        self.asked.append(host)
        answers = self._answers.get(host)
        if not answers:
            raise OSError(f"no such host: {host}")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return tuple(map(ip_address, answer))
