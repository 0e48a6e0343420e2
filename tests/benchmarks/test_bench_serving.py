"""The load generator against small endpoints that behave well and badly."""

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import bench_fields
from benchmarks.bench_serving import Load, main, run_level
from benchmarks.chat_client import make_prompt, stream_request
from benchmarks.serving_metrics import RequestRecord

LOAD = Load(
    model="gemma", num_requests=5, prompt_words=4, max_tokens=2, ignore_eos=True, seed=1
)  # fmt: skip
DONE = b"data: [DONE]\n\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"role": "assistant", "content": content}}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})


async def send(answer: httpx.Response) -> RequestRecord:
    """One request to an endpoint that always gives ``answer``."""
    transport = httpx.MockTransport(lambda _: answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        return await stream_request(client, {})


def sse(*chunks: bytes) -> httpx.Response:
    return httpx.Response(200, content=b"".join(chunks))


async def test_tokens_come_from_usage_and_times_from_chunks_with_text() -> None:
    record = await send(sse(text(""), text("a"), b": ping\n\n", text("b"), USAGE, DONE))
    assert record.error is None
    assert (record.prompt_tokens, record.completion_tokens) == (7, 3)
    assert len(record.chunk_times_s) == 2
    assert record.started_s <= record.chunk_times_s[0] <= record.ended_s


async def test_chunks_are_counted_where_there_is_no_usage() -> None:
    record = await send(sse(text(""), text("a"), text("b"), DONE))
    assert (record.prompt_tokens, record.completion_tokens) == (0, 2)


async def test_stream_may_end_with_a_finish_reason_instead_of_done() -> None:
    last = event(choices=[{"index": 0, "delta": {"content": "b"}, "finish_reason": "length"}])
    record = await send(sse(text("a"), last))
    assert (record.error, record.text) == (None, "ab")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(400, text="no such field"), "StreamError: status 400: no such field"),
        (sse(text("a")), "StreamError: the stream ended before [DONE]"),
        (sse(event(error={"message": "boom"})), "StreamError: error event: {'message': 'boom'}"),
        (
            sse(b"data: {\n\n"),
            "JSONDecodeError: Expecting property name enclosed in double quotes: "
            "line 1 column 3 (char 2)",
        ),
    ],
)
async def test_failure_is_recorded(answer: httpx.Response, error: str) -> None:
    assert (await send(answer)).error == error


async def test_level_keeps_as_many_requests_under_way_as_asked() -> None:
    under_way = 0
    seen: list[tuple[int, str]] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal under_way
        under_way += 1
        await asyncio.sleep(0)
        seen.append((under_way, json.loads(request.content)["messages"][0]["content"]))
        under_way -= 1
        return sse(text("a"), DONE)

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        records = await run_level(client, LOAD, 2)
    assert [record.error for record in records] == [None] * 5
    assert max(number for number, _ in seen) == 2
    assert len({prompt for _, prompt in seen}) == 5


def test_body_fixes_the_length_of_the_answer() -> None:
    assert LOAD.body(8, 0) == {
        "model": "gemma",
        "messages": [{"role": "user", "content": make_prompt("1-8-0", 4)}],
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_prompts_differ_from_their_first_word_on() -> None:
    prompts = [LOAD.body(level, index)["messages"][0]["content"].split()
               for level in (1, 8) for index in range(20)]  # fmt: skip
    assert len({words[0] for words in prompts}) == 40
    assert {len(words) for words in prompts} == {4}


class Endpoint(BaseHTTPRequestHandler):
    """Lists one model and answers every chat with two tokens."""

    bodies: list[dict[str, Any]]
    keys: list[str | None]

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "served-model"}, {"id": "other"}]}).encode())

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.keys.append(self.headers["Authorization"])
        self._send(text("a") + text("b") + USAGE + DONE)

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    Endpoint.bodies, Endpoint.keys = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_whole_run_prints_a_table_and_writes_json(
    endpoint: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = tmp_path / "cat.png", tmp_path / "results" / "out.json"
    image.write_bytes(b"cat")
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    status = main(
        f"--base-url {url} --api-key secret --concurrency 1 2 --num-requests 3 --seed 5 "
        f"--image {image} --json {out}".split()
    )
    assert status == 0
    assert len(Endpoint.bodies) == 1 + 2 * 3
    assert set(Endpoint.keys) == {"Bearer secret"}
    assert {body["model"] for body in Endpoint.bodies} == {"served-model"}
    image_part = Endpoint.bodies[0]["messages"][0]["content"][1]
    assert image_part["image_url"]["url"] == "data:image/png;base64,Y2F0"
    results = json.loads(out.read_text())
    assert [level["completion_tokens"] for level in results["levels"]] == [9, 9]
    assert results["settings"]["seed"] == 5
    assert "date" in results["environment"]
    assert "secret" not in out.read_text()
    assert "TTFT p50" in capsys.readouterr().out


def test_costs_of_fields_are_measured_with_the_same_prompts(
    endpoint: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    arguments = f"--base-url {url} --concurrency 2 --rounds 1 --json {out}".split()
    assert bench_fields.main(arguments) == 0
    rates = json.loads(out.read_text())["output_tokens_per_s"]
    assert rates.keys() == bench_fields.FIELDS.keys()
    assert all(rate > 0 for rate in rates.values())
    measured = [body for body in Endpoint.bodies if "cache_salt" in body]
    prompts = [json.dumps(body["messages"]) for body in measured]
    assert sorted(prompts[:2]) == sorted(prompts[2:4]) == sorted(prompts[-2:])
    assert {"top_logprobs": 5, "logprobs": True}.items() <= measured[-1].items()
    assert "top_logprobs=5" in capsys.readouterr().out


def test_run_with_errors_exits_with_one(
    endpoint: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    endpoint.RequestHandlerClass = Refusing
    assert main(f"--base-url {url} --model any --num-requests 2 --concurrency 1".split()) == 1
    assert "concurrency 1: 2 x StreamError: status 503: busy" in capsys.readouterr().err


def test_unreachable_endpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        port = server.server_port
    assert main(["--base-url", f"http://127.0.0.1:{port}/v1"]) == 1
    assert f"cannot use http://127.0.0.1:{port}/v1" in capsys.readouterr().err


class Refusing(Endpoint):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"busy")


def test_every_request_has_the_fields_that_the_load_adds() -> None:
    body = replace(LOAD, extra={"logprobs": True, "max_tokens": 9}).body(8, 0)
    assert (body["logprobs"], body["max_tokens"], body["model"]) == (True, 9, "gemma")
