"""The bytes of server-sent events."""

import pytest

from gemma_serve.openai_api.sse import DONE, encode_event


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
