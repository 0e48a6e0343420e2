"""Server-sent events: their bytes, and the response that sends them.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemma_serve.openai_api.disconnects import finish_despite_cancellation

DONE: Final = b"data: [DONE]\n\n"

_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode_event(payload: Mapping[str, object]) -> bytes:
    """One event with a JSON object (a ``dict``) as its data."""
    text = _encode_json(payload)
    if not text.isascii():
        # Legal in JSON, but many clients split lines with str.splitlines, which stops at these.
        text = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028")
        text = text.replace("\u2029", "\\u2029")
    return b"data: " + text.encode() + b"\n\n"


class EventStreamResponse(Response):
    """Sends events as they come, and closes their source however that ends."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        # Starlette's StreamingResponse would leave the source open when it is cancelled before the
        # first event, and cancel the closing itself again and again.
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async with aclosing(self._events):
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await finish_despite_cancellation(self._close())
