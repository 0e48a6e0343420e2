"""Server-sent events: their bytes, and the response that sends them.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Final, Self

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemma_serve.openai_api.disconnects import finish_despite_cancellation

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
"""A comment, which clients skip."""

_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode_event(payload: Mapping[str, object]) -> bytes:
    """One event with a JSON object (a ``dict``) as its data."""
    text = _encode_json(payload)
    if not text.isascii():
        # Legal in JSON, but many clients split lines with str.splitlines, which stops at these.
        text = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028")
        text = text.replace("\u2029", "\\u2029")
    return b"data: " + text.encode() + b"\n\n"


def encode_named_event(payload: Mapping[str, object]) -> bytes:
    """The same, called what its ``type`` says."""
    return b"event: %s\n%s" % (str(payload["type"]).encode(), encode_event(payload))


class EventStreamResponse(Response):
    """Sends events as they come, and closes their source however that ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        keep_alive_interval_s: float,
    ) -> None:
        """``close`` gives back what ``events`` come from. A comment is sent after each
        ``keep_alive_interval_s`` without an event."""
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._close = close
        self._keep_alive_interval_s = keep_alive_interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        # Starlette's StreamingResponse would leave the source open when it is cancelled before the
        # first event, and cancel the closing itself again and again.
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            async with aclosing(self._events), _KeepAlive(send, self._keep_alive_interval_s) as out:
                async for event in self._events:
                    await out.send(event)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await finish_despite_cancellation(self._close())


class _KeepAlive:
    """Sends pieces of a body, and comments while there are none."""

    def __init__(self, send: Send, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._is_sending = asyncio.Lock()

    async def send(self, piece: bytes) -> None:
        async with self._is_sending:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            self._sent_at = self._loop.time()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._comment_on_silence())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await finish_despite_cancellation(self._stopped())

    async def _stopped(self) -> None:
        await asyncio.wait({self._task})

    async def _comment_on_silence(self) -> None:
        # One timer for each interval, none for each event.
        while True:
            silent_s = self._loop.time() - self._sent_at
            await asyncio.sleep(self._interval_s - silent_s)
            if self._loop.time() - self._sent_at >= self._interval_s:
                try:
                    await self.send(KEEP_ALIVE)
                except ClientDisconnect:
                    return  # whoever waits for the client's leaving hears of it too
