"""Reading a body as JSON, with its cost bounded before anything is built from it.

A body of 30 MB can be ten million empty objects: gigabytes once they are Python's, and many times
that once each has failed its check. So values are counted in the bytes, which takes milliseconds.
"""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from gemma_serve.errors import InvalidRequestError
from gemma_serve.openai_api.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES

# A whole string or a mark. Possessive, so that no byte is read twice.
_STRING_OR_MARK: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[\]{}]', re.DOTALL)


class JsonBodyRoute(APIRoute):
    """A route that refuses a body out of bounds before FastAPI reads it."""

    # FastAPI's own type for this holds Any.
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_within_bounds(request: Request) -> Response:
            bounded = _JsonBodyRequest(request.scope, request.receive)
            if self.body_field is not None:
                _check_encoding(bounded)
                check_num_values(await bounded.body())
            return await handle(bounded)

        return handle_within_bounds


class _JsonBodyRequest(Request):
    async def json(self) -> object:
        return parse_json(await self.body())


def _check_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        # To decompress is to trust a stranger about the size of the result.
        raise HTTPException(
            415,
            f"The body must not be compressed; its content-encoding is {encoding[:32]!r}",
            headers={"accept-encoding": "identity"},
        )


def check_num_values(body: bytes) -> None:
    """Raise ``InvalidRequestError`` if there are more than ``MAX_JSON_VALUES``, keys not counted.

    It names the field in which there are too many.
    """
    # One value, and one more after each of these. Texts have commas too, but seldom so many.
    if 1 + sum(body.count(mark) for mark in (b",", b"{", b"[")) <= MAX_JSON_VALUES:
        return
    num_values, num_strings, depth = 1, 0, 0
    field = b""
    for match in _STRING_OR_MARK.finditer(body):
        token = match[0]
        if token[:1] == b'"':
            num_strings += 1
            if depth == 1:
                field = token
        elif token in b"]}":
            depth -= 1
        else:
            num_values += 1
            depth += token != b","
        # Strings without commas between them are no JSON, and must not go on for ever either.
        if num_values > MAX_JSON_VALUES or num_strings > 2 * MAX_JSON_VALUES:
            raise InvalidRequestError(
                f"The body has more than {MAX_JSON_VALUES} JSON values",
                param=field.strip(b'"')[:64].decode(errors="replace") or None,
                code="invalid_value",
            )


def parse_json(body: bytes) -> object:
    """The value that ``body`` holds by RFC 8259, or by Python: ``NaN`` and ``Infinity`` besides.

    Raises ``JSONDecodeError`` or ``HTTPException``, the two that FastAPI passes on.
    """
    too_deep = HTTPException(400, f"The body is nested more than {MAX_JSON_DEPTH} levels deep")
    try:
        # Left to itself, json reads UTF-16 too, in which bytes cannot be counted.
        value: object = json.loads(body.decode("utf-8-sig"))
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"The body is not UTF-8 at byte {error.start}") from None
    except ValueError:
        raise HTTPException(400, "The body has an integer of too many digits") from None
    except RecursionError:
        raise too_deep from None
    if is_deeper(value, MAX_JSON_DEPTH):
        raise too_deep
    return value


def is_deeper(value: object, max_depth: int) -> bool:
    """Whether lists and objects are nested in ``value`` beyond ``max_depth`` levels."""
    level = [value]
    for _ in range(max_depth):
        level = [inner for outer in level for inner in _containers_in(outer)]
        if not level:
            return False
    return True


def _containers_in(value: object) -> list[object]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]
