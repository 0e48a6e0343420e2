"""The one table from an exception to what the caller sees of it."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gemma_serve.errors import (
    AuthenticationError,
    GemmaServeError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    RequestError,
    UnavailableError,
)
from gemma_serve.openai_api.response_schemas import ErrorDetails, ErrorResponse
from gemma_serve.openai_api.validation_errors import invalid_request

logger = logging.getLogger(__name__)

UNAVAILABLE_RETRY_AFTER_S: Final = 1
"""Another replica may answer at once. A model that loads takes longer, and clients back off."""


@dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    type: str
    code: str | None = None


# Looked up along the exception's bases, so the last line is what nobody expected.
_RULES: Final[Mapping[type, _Rule]] = {
    InvalidRequestError: _Rule(400, "invalid_request_error"),
    AuthenticationError: _Rule(401, "invalid_request_error", "invalid_api_key"),
    NotFoundError: _Rule(404, "invalid_request_error"),
    PayloadTooLargeError: _Rule(413, "invalid_request_error"),
    OverloadedError: _Rule(429, "rate_limit_error", "rate_limit_exceeded"),
    UnavailableError: _Rule(503, "service_unavailable", "model_unavailable"),
    GenerationError: _Rule(500, "server_error"),
    Exception: _Rule(500, "server_error"),
}


def error_response(error: Exception) -> Response:
    """The whole HTTP answer to a request that ended in ``error``."""
    return _response(error, _rule(error).status, _headers(error))


def error_body(error: Exception) -> ErrorResponse:
    """OpenAI's error object. Only our own errors' messages are shown: they were written for it."""
    rule = _rule(error)
    is_ours = isinstance(error, GemmaServeError)
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    if isinstance(error, InvalidRequestError) and param is not None:
        code = code or "invalid_value"
    return ErrorResponse(
        error=ErrorDetails(
            message=_printable(str(error)) if is_ours else "The server failed to answer.",
            type=rule.type,
            param=None if param is None else _printable(param),
            code=code or rule.code,
        )
    )


def log_failure(error: Exception, request_id: str) -> None:
    """Log what an operator should know of: nothing that the caller alone can mend."""
    if not isinstance(error, GemmaServeError):
        logger.error("failed request_id=%s", request_id, exc_info=error)
    elif _rule(error).status >= 500:
        logger.warning("failed request_id=%s error=%r", request_id, error)


async def handle_error(request: Request, error: Exception) -> Response:
    """Exception handler for our own errors."""
    log_failure(error, request.state.request_id)
    return error_response(error)


async def handle_validation_error(_: Request, error: Exception) -> Response:
    """Exception handler for bodies that do not fit their schema; OpenAI answers 400, not 422."""
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error))


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for what the router and the body reader raise: 404, 405, 413, 400."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            ours: RequestError = NotFoundError(f"Unknown URL ({where})")
        case 405:
            ours = InvalidRequestError(f"Method not allowed ({where})")
        case _:
            ours = InvalidRequestError(str(error.detail))
    return _response(ours, error.status_code, error.headers or {})


def _rule(error: Exception) -> _Rule:
    return next(_RULES[cls] for cls in type(error).__mro__ if cls in _RULES)


def _response(error: Exception, status: int, headers: Mapping[str, str]) -> Response:
    content = error_body(error).model_dump_json()
    return Response(content, status, dict(headers), media_type="application/json")


def _headers(error: Exception) -> dict[str, str]:
    match error:
        case AuthenticationError():
            return {"www-authenticate": "Bearer"}
        case OverloadedError(retry_after_s=seconds):
            return {
                "retry-after": str(max(1, math.ceil(seconds))),
                "retry-after-ms": str(round(seconds * 1000)),
            }
        case UnavailableError():
            return {"retry-after": str(UNAVAILABLE_RETRY_AFTER_S)}
        case _:
            return {}


def _printable(text: str) -> str:
    # A caller's own lone surrogate may be quoted, and UTF-8 has no bytes for it.
    return text.encode(errors="backslashreplace").decode()
