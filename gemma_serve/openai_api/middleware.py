"""What every request passes through, as pure ASGI.

Starlette's ``BaseHTTPMiddleware`` hides a client's leaving before the headers, so it is not used.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_serve.errors import AuthenticationError, PayloadTooLargeError
from gemma_serve.openai_api.error_responses import error_response, log_failure
from gemma_serve.openai_api.metrics.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_OPEN_PATHS: Final = ("/health", "/ping", "/metrics")
_OPENAI_VERSION: Final = "2020-10-01"
"""OpenAI's only version of its API."""
_REQUEST_ID_HEADERS: Final = ("x-request-id", "x-client-request-id")


class RequestContext:
    """Gives every request an id and every answer its headers, and has the last word on errors.

    The id is ``request.state.request_id``. A client may choose it, so it is for logs only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-version"] = _OPENAI_VERSION
                elapsed_s = time.perf_counter() - started_at
                headers["openai-processing-ms"] = str(round(elapsed_s * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            logger.info("client left request_id=%s", request_id)
        except Exception as error:
            log_failure(error, request_id)
            if has_started:
                raise  # only the server can still tell the client, by cutting the connection
            await error_response(error)(scope, receive, send_with_headers)


class CountRequests:
    """Counts answers by their route, so that what clients make up is not told apart."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                status = str(message["status"])
                self._metrics.http_requests.add(route=route, status=status)
            await send(message)

        await self._app(scope, receive, send_and_count)


class ApiKeyCheck:
    """Lets only requests with a known key pass; ``/health``, ``/ping``, ``/metrics`` and CORS
    preflights need none.

    ``request.state.api_key_id`` stands for the key from then on and does not tell it.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        digest = self._known_digest(scope)
        if digest is None:
            error = AuthenticationError(
                "Missing or wrong API key; send it as 'Authorization: Bearer KEY'"
            )
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key_id"] = digest.hex()
        await self._app(scope, receive, send)

    def _known_digest(self, scope: Scope) -> bytes | None:
        """The digest of the request's key, if it is one of ours."""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(key.strip().encode("latin-1"))  # the bytes as they came
        # Digests are of one length, and a wrong key meets all: the time says nothing about ours.
        is_known = any(hmac.compare_digest(digest, known) for known in self._digests)
        return digest if is_known else None


class BodyLimit:
    """Answers 413 instead of reading a body without end, whether its length is told or not.

    A client that takes too long to send it gets a 408: it holds a place that others wait for.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"The body is larger than {self._max_body_bytes} bytes"
        if _content_length(scope) > self._max_body_bytes:
            await error_response(PayloadTooLargeError(too_large))(scope, receive, send)
            return
        num_bytes = 0
        deadline: float | None = asyncio.get_running_loop().time() + self._body_timeout_s

        async def receive_within_limit() -> Message:
            nonlocal num_bytes, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"The body did not come within {self._body_timeout_s:g} s"
                ) from None
            if not message.get("more_body", False):
                deadline = None  # what comes now is the client's leaving
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                # FastAPI makes a 400 of whatever else its reading of the body raises.
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, receive_within_limit, send)


def _request_id(headers: Headers) -> str:
    for name in _REQUEST_ID_HEADERS:
        if _SANE_REQUEST_ID.fullmatch(headers.get(name, "")):
            return headers[name]
    return f"req_{uuid.uuid4().hex}"


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    is_preflight: bool = scope["method"] == "OPTIONS"
    return path in _OPEN_PATHS or is_preflight


def _content_length(scope: Scope) -> int:
    value = Headers(scope=scope).get("content-length", "")
    # Servers refuse malformed lengths; without one the bytes are counted as they come.
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
