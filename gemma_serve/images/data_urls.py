"""Images inside the request: RFC 2397 ``data:`` URLs."""

import base64
import binascii
import string
from typing import Final
from urllib.parse import unquote_to_bytes

from gemma_serve.errors import InvalidRequestError

_WHITESPACE: Final = string.whitespace.encode()


def decode_data_url(url: str, *, max_bytes: int) -> bytes:
    """Return the bytes that ``url`` carries.

    The media type is ignored: clients get it wrong, and the content decides. The payload is read
    as forgivingly as browsers read it (https://infra.spec.whatwg.org/#forgiving-base64-decode):
    white space and missing padding are fine.
    """
    header, comma, payload = url.partition(",")
    if not comma:
        raise InvalidRequestError('a data: URL must have a "," between its header and its data')
    if header.split(";")[-1].strip().lower() != "base64":
        raise InvalidRequestError(
            'a data: URL must be base64-encoded and start like "data:image/png;base64,"'
        )
    content = _decode_base64(payload)
    if len(content) > max_bytes:
        raise InvalidRequestError(
            f"the image has {len(content)} bytes, at most {max_bytes} are allowed"
        )
    return content


def _decode_base64(payload: str) -> bytes:
    try:
        encoded = payload.encode("ascii")
        if b"%" in encoded:
            encoded = unquote_to_bytes(encoded)
        encoded = encoded.translate(None, _WHITESPACE)
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise InvalidRequestError("the data: URL is not valid base64") from None
