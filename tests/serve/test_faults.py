"""Clients that leave, replicas that die, queues that are full."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import Server
from tests.serve.test_streaming import chat, post

PATIENCE_S = 10.0


async def wait_for_num_running(server: Server, expected: int) -> None:
    """Ask the replica until as many requests as ``expected`` hold a place in the model."""
    async with asyncio.timeout(PATIENCE_S):
        # Another process: there is no event to wait for.
        while await server.gemma.num_running.remote() != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def streaming(server: Server, script: str) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a streamed answer; leaving closes the connection."""
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream(
            "POST", f"{server.url}/v1/chat/completions", json=chat(script, stream=True)
        ) as response,
    ):
        yield response.aiter_lines()


async def test_client_that_leaves_in_the_middle_of_a_stream_frees_its_place(
    server: Server,
) -> None:
    async with streaming(server, "go on") as lines:
        await anext(lines)
        await wait_for_num_running(server, 1)
    await wait_for_num_running(server, 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", ["wait", "think"])
async def test_client_that_leaves_before_the_first_token_frees_its_place(
    server: Server, script: str, stream: bool
) -> None:
    waiting = asyncio.create_task(post(server, script, stream=stream))
    await wait_for_num_running(server, 1)
    waiting.cancel()
    await wait_for_num_running(server, 0)


async def test_client_that_leaves_an_unary_answer_frees_its_place(server: Server) -> None:
    waiting = asyncio.create_task(post(server, "go on", stream=False))
    await wait_for_num_running(server, 1)
    waiting.cancel()
    await wait_for_num_running(server, 0)


async def test_replica_that_dies_ends_its_streams_with_an_error_event_and_is_replaced(
    server: Server,
) -> None:
    async with streaming(server, "go on") as lines:
        await anext(lines)
        os.kill(await server.gemma.pid.remote(), signal.SIGKILL)
        rest = [line async for line in lines]
    assert any("has stopped. Please send the request again." in line for line in rest)
    response = await post(server, "say again", stream=False)
    assert response.json()["choices"][0]["message"]["content"] == "again"


async def test_request_beyond_the_queue_gets_a_429_that_says_when_to_come_back(
    full_server: Server,
) -> None:
    await post(full_server, "say hello", stream=False)  # the ingress knows the model now
    sent = [asyncio.create_task(post(full_server, "think", stream=False)) for _ in range(5)]
    done, _ = await asyncio.wait(sent, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
    response = done.pop().result()
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    for task in sent:
        task.cancel()


def test_ingress_process_is_small_and_has_no_torch(server: Server) -> None:
    (process,) = (
        path.parent
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"ServeReplica:{server.application}:OpenAI".encode() in _read(path)
    )
    resident_kib = int(_read(process / "status").split(b"VmRSS:")[1].split()[0])
    assert resident_kib < 400 * 1024
    assert b"torch" not in _read(process / "maps")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""
