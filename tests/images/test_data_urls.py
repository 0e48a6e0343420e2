import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.data_urls import decode_data_url

CONTENT = b"\xfb\xff\xfe\x00x"  # "+//+AHg=": every kind of character that is easily mangled


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,+//+AHg=",
        "DATA:image/png;BASE64,+//+AHg=",
        "data:;base64,+//+AHg=",
        "data:image/jpeg;charset=utf-8;base64,+//+AHg=",
        "data:image/png;name=a b.png; base64,+//+AHg=",
        "data:image/png;base64,+//+AHg",
        "data:image/png;base64,%2B%2f%2F%2BAHg%3D",
        "data:image/png;base64,+//+\r\n AHg=\n",
        "data:image/png;base64,+//+%0AAHg%3D%20",
    ],
)
def test_every_common_spelling_is_read(url: str) -> None:
    assert decode_data_url(url, max_bytes=5) == CONTENT


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", 'a data: URL must have a "," between its header and its data'),
        (
            "data:image/png,+//+AHg=",
            'a data: URL must be base64-encoded and start like "data:image/png;base64,"',
        ),
        (
            "data:base64,+//+AHg=",
            'a data: URL must be base64-encoded and start like "data:image/png;base64,"',
        ),
        ("data:image/png;base64,+//+A", "the data: URL is not valid base64"),
        ("data:image/png;base64,+//+AHg==", "the data: URL is not valid base64"),
        ("data:image/png;base64,-__-AHg=", "the data: URL is not valid base64"),
        ("data:image/png;base64,+//+AHg=é", "the data: URL is not valid base64"),
        ("data:image/png;base64,+//+AHg=\ud800", "the data: URL is not valid base64"),
        ("data:image/png;base64,+//+AHg=,+//+AHg=", "the data: URL is not valid base64"),
        ("data:image/png;base64,+//+AHh4", "the image has 6 bytes, at most 5 are allowed"),
    ],
)
def test_malformed_url_is_refused_with_the_reason(url: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_data_url(url, max_bytes=5)
    assert str(caught.value) == message
