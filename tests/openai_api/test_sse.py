"""The bytes of server-sent events."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from gemma_serve.openai_api.sse import DONE, KEEP_ALIVE, EventStreamResponse, encode_event


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("Hi", b'"Hi"'),
        ("é🙂", '"é🙂"'.encode()),
        ('"\\', rb'"\"\\"'),
        ("a\r\n\nb\0", rb'"a\r\n\nb\u0000"'),
        ("\x85\u2028\u2029", rb'"\u0085\u2028\u2029"'),
    ],
)
def test_event_is_one_line_of_compact_json(text: str, encoded: bytes) -> None:
    event = encode_event({"a": 1, "text": text})
    assert event == b'data: {"a":1,"text":' + encoded + b"}\n\n"
    assert len(event.decode().splitlines()) == 2


def test_stream_ends_with_openais_marker() -> None:
    assert DONE == b"data: [DONE]\n\n"


class Silence:
    """Events with waits between them, and what an ASGI server would see."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.is_closed = False
        self.go_on = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes, None]:
        await self.go_on.wait()
        yield b"data: 1\n\n"

    async def close(self) -> None:
        self.is_closed = True

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            if self.bodies.count(KEEP_ALIVE) == 2:
                self.go_on.set()

    async def receive(self) -> Message:
        raise AssertionError("nobody reads")


async def test_silence_is_filled_with_comments_until_the_event_comes() -> None:
    silence = Silence()
    response = EventStreamResponse(silence.events(), silence.close, 0.001)
    await response({}, silence.receive, silence.send)
    assert silence.bodies == [KEEP_ALIVE, KEEP_ALIVE, b"data: 1\n\n", b""]
    assert silence.is_closed


async def test_no_comment_comes_before_the_interval_has_passed() -> None:
    silence = Silence()
    silence.go_on.set()
    await EventStreamResponse(silence.events(), silence.close, 3600)(
        {}, silence.receive, silence.send
    )
    assert silence.bodies == [b"data: 1\n\n", b""]
    assert len(asyncio.all_tasks()) == 1


async def test_comments_stop_when_the_response_is_cancelled() -> None:
    silence = Silence()
    response = EventStreamResponse(silence.events(), silence.close, 3600)
    task = asyncio.create_task(response({}, silence.receive, silence.send))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert silence.is_closed
    assert len(asyncio.all_tasks()) == 1


async def test_client_that_left_stops_the_comments_and_nothing_else() -> None:
    silence = Silence()

    async def send(message: Message) -> None:
        if message.get("body") == KEEP_ALIVE:
            silence.go_on.set()
            raise ClientDisconnect
        await silence.send(message)

    await EventStreamResponse(silence.events(), silence.close, 0.001)({}, silence.receive, send)
    assert silence.bodies == [b"data: 1\n\n", b""]
