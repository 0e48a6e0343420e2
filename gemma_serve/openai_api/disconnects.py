"""What happens when a client leaves: its request is cancelled, and what it held is given back.

Ray Serve cancels the task of a request whose client is gone; plain ASGI servers only say
``http.disconnect`` to whoever asks. ``CancelOnDisconnect`` makes the second like the first, so that
nothing else has to know.
"""

import asyncio
from collections.abc import Awaitable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def finish_despite_cancellation(work: Awaitable[None]) -> None:
    """Await ``work`` to its end; a cancellation that comes meanwhile is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


class CancelOnDisconnect:
    """Pure ASGI middleware that cancels the application when the client leaves it.

    Raises ``ClientDisconnect`` then, once the application has given back what it held.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            # Without a deadline: asyncio.timeout is the standard library's only cancel scope.
            async with asyncio.timeout(None) as cancel_scope:
                connection = _Connection(receive, send, cancel_scope)
                try:
                    await self._app(scope, connection.receive, connection.send)
                finally:
                    connection.stop_watching()
        except TimeoutError:
            if not cancel_scope.expired():
                raise
            raise ClientDisconnect from None


class _Connection:
    """One request's messages; watches for its end from the body's end to the answer's."""

    def __init__(self, receive: Receive, send: Send, cancel_scope: asyncio.Timeout) -> None:
        self._receive = receive
        self._send = send
        self._cancel_scope = cancel_scope
        self._watcher: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        if self._watcher is not None:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            # From here on servers report a disconnect although all went well.
            self.stop_watching()
        try:
            await self._send(message)
        except OSError as error:  # how ASGI 2.4 servers tell a sender
            raise ClientDisconnect from error

    def stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        self._cancel_scope.reschedule(0)
