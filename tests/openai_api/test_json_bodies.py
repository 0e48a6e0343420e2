"""A body of any shape costs about as much as an honest one, or is refused before it costs more."""

import asyncio
import gzip
import json

import pytest
from fastapi import FastAPI

from gemma_serve.openai_api.json_bodies import check_num_values, parse_json
from gemma_serve.openai_api.limits import MAX_CONTENT_PARTS, MAX_JSON_DEPTH, MAX_JSON_VALUES
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import CHAT, HELLO, Exchange, connect, error_of, make_app, post_chat

TEXT_PART = b'{"type":"text","text":""}'
JSON = {"content-type": "application/json"}


def user_content(items: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":[' + items + b"]}]}"


async def post_bytes(
    body: bytes, *, app: FastAPI | None = None, **headers: str
) -> tuple[int, dict[str, str | None]]:
    async with connect(app or make_app(FakeGenerationClient(*answer("hi")))) as http:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await http.post(CHAT, content=body, headers=JSON | named)
    return response.status_code, {} if response.status_code == 200 else error_of(response)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (user_content(b",".join([TEXT_PART] * 1_000_000)), "messages"),
        (user_content(b",".join([b"{}"] * 1_000_000)), "messages"),
        (b'{"model":"m","stop":["' + b'","'.join([b"x"] * 1_000_000) + b'"]}', "stop"),
        (b'{"foo":{"a":1},"bar":' + b"[[]," * 500_000, "bar"),
        (b"[" * 1_000_000, None),
        (b'""' * 2_000_000 + b"," * MAX_JSON_VALUES, ""),
    ],
    ids=["parts", "invalid parts", "strings", "unknown field", "brackets", "adjacent strings"],
)
async def test_millions_of_values_are_refused_in_the_bytes(body: bytes, param: str | None) -> None:
    """A 30 MB body of empty objects took more than 8 GB, and a 50 MB one of texts 40 seconds."""
    async with asyncio.timeout(5):
        status, error = await post_bytes(body)
    assert status == 400
    assert error["message"] == f"The body has more than {MAX_JSON_VALUES} JSON values"
    assert error["param"] == (param or None)


async def test_commas_in_text_are_no_values() -> None:
    body = json.dumps({**HELLO, "messages": [{"role": "user", "content": ',[{\\"' * 600_000}]})
    assert await post_bytes(body.encode()) == (200, {})


def test_as_many_values_as_allowed_are_read() -> None:
    body = b"[" + b",".join([b"1"] * (MAX_JSON_VALUES - 1)) + b"]"
    check_num_values(body)
    assert len(json.loads(body)) == MAX_JSON_VALUES - 1


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_CONTENT_PARTS + 1)},
        {"role": "user", "content": [5] * (MAX_CONTENT_PARTS + 1)},
        {"role": "assistant", "tool_calls": [{}] * (MAX_CONTENT_PARTS + 1)},
    ],
)
async def test_too_many_parts_are_refused_by_their_number(message: dict[str, object]) -> None:
    response = await post_chat(make_app(FakeGenerationClient()), messages=[message])
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == "messages"
    assert f"At most {MAX_CONTENT_PARTS} content parts" in str(error["message"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", [5] * 100_000),
        ("stop_token_ids", ["a"] * 100_000),
        ("logit_bias", {f"x{i}": 1 for i in range(100_000)}),
        ("messages", [5] * 100_000),
    ],
)
async def test_invalid_items_of_a_long_list_are_not_checked_one_by_one(
    field: str, value: object
) -> None:
    """pydantic counts valid items against a list's limit, and reports each invalid one."""
    async with asyncio.timeout(5):
        response = await post_chat(make_app(FakeGenerationClient()), **{field: value})
    error = error_of(response)
    assert error["param"] in {field, f"{field}[0]"}
    assert len(str(error["message"])) < 200


@pytest.mark.parametrize(
    "nested",
    [
        b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH,
        b'{"a":' * MAX_JSON_DEPTH + b"1" + b"}" * MAX_JSON_DEPTH,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=["lists", "objects", "beyond the stack", "objects beyond the stack"],
)
async def test_nesting_without_end_is_a_400(nested: bytes) -> None:
    status, error = await post_bytes(b'{"model":"m","x":' + nested + b"}")
    assert status == 400
    assert error["message"] == f"The body is nested more than {MAX_JSON_DEPTH} levels deep"


def test_nesting_up_to_the_limit_is_read() -> None:
    body = b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH
    assert parse_json(body) == json.loads(body)


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip", "nonsense"])
async def test_compressed_body_is_refused_and_told_so(encoding: str) -> None:
    body = gzip.compress(json.dumps(HELLO).encode())
    status, error = await post_bytes(body, content_encoding=encoding)
    assert status == 415
    assert error["message"] == (
        f"The body must not be compressed; its content-encoding is {encoding!r}"
    )


async def test_identity_is_no_compression() -> None:
    assert await post_bytes(json.dumps(HELLO).encode(), content_encoding="Identity") == (200, {})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
async def test_body_in_another_encoding_is_a_400(encoding: str) -> None:
    body = json.dumps({**HELLO, "user": "é"}, ensure_ascii=False)
    status, error = await post_bytes(body.encode(encoding))
    assert (status, error["type"]) == (400, "invalid_request_error")


async def test_byte_order_mark_of_utf_8_is_skipped() -> None:
    assert await post_bytes(json.dumps(HELLO).encode("utf-8-sig")) == (200, {})


async def test_integer_of_thousands_of_digits_is_told_as_such() -> None:
    status, error = await post_bytes(b'{"n": ' + b"9" * 5000 + b"}")
    assert (status, error["message"]) == (400, "The body has an integer of too many digits")


async def test_of_a_repeated_key_the_last_counts() -> None:
    client = FakeGenerationClient(*answer("hi"))
    body = json.dumps(HELLO)[:-1] + ', "n": 3, "n": 1}'
    assert await post_bytes(body.encode(), app=make_app(client)) == (200, {})
    assert client.requests[0].n == 1


async def test_nan_where_nobody_reads_it_is_no_failure() -> None:
    fields = {"foo": float("nan"), "metadata": {"a": float("inf")}}
    response = await post_chat(make_app(FakeGenerationClient(*answer("hi"))), **fields)
    assert response.status_code == 200


async def test_client_that_takes_too_long_to_send_its_body_is_told_so() -> None:
    app = make_app(FakeGenerationClient(*answer("hi")), body_timeout_s=0.01)
    exchange = Exchange(app)
    exchange.send_bytes(b'{"model":', more_body=True)
    async with asyncio.timeout(5):
        await exchange.task
    assert exchange.sent[0]["status"] == 408
    assert json.loads(exchange.sent[1]["body"])["error"]["message"] == (
        "The body did not come within 0.01 s"
    )


async def test_the_answer_may_take_longer_than_the_body() -> None:
    gate = asyncio.Event()
    client = FakeGenerationClient(gate, *answer("hi"))
    exchange = Exchange(make_app(client, body_timeout_s=0.01))
    exchange.send_body()
    await client.waiting.wait()
    await asyncio.sleep(0.05)
    gate.set()
    await exchange.task
    assert exchange.sent[0]["status"] == 200
