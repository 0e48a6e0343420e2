"""Streams past Ray; no cluster needed."""

import asyncio
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.return_path import ReturnAddress, ReturnSocket, StreamSender
from gemma_serve.errors import ContextLengthError
from gemma_serve.generation import (
    ChatPrompt,
    GenerationDelta,
    GenerationRequest,
    GenerationStarted,
    SamplingParams,
)
from gemma_serve.messages import ChatMessage, Role, TextPart
from tests.serve.scripted_gemma import ScriptedGemma

ROOT = Path(__file__).parents[2]
ELSEWHERE = ReturnAddress("/no/such/socket", bytes(16))
STARTED = GenerationStarted(prompt_tokens=3)
WORDS = [[GenerationDelta(0, word, (1,))] for word in ("Pa", "ris")]


@pytest.fixture
async def returns() -> AsyncIterator[ReturnSocket]:
    socket = ReturnSocket()
    yield socket
    socket.close()


async def sender_to(address: ReturnAddress) -> StreamSender:
    sender = await StreamSender.connect(address)
    assert sender is not None
    return sender


def request(script: str) -> GenerationRequest:
    message = ChatMessage(Role.USER, (TextPart(script),))
    return GenerationRequest(
        request_id="r", prompt=ChatPrompt((message,)), sampling=SamplingParams()
    )


async def send_for_ever(sender: StreamSender) -> None:
    while True:
        await sender.send(WORDS)
        await asyncio.sleep(0)


async def collected(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def test_items_arrive_in_their_order_until_the_end(returns: ReturnSocket) -> None:
    stream = await returns.expect()
    async with await sender_to(stream.address) as sender:
        await sender.send(STARTED)
        await sender.send(WORDS)
        await sender.send_end()
    assert await stream.receive() == STARTED
    assert await stream.receive() == WORDS
    with pytest.raises(StopAsyncIteration):
        await stream.receive()
    stream.close()


async def test_streams_at_one_socket_do_not_mix(returns: ReturnSocket) -> None:
    first, second = await returns.expect(), await returns.expect()
    async with (
        await sender_to(second.address) as to_second,
        await sender_to(first.address) as to_first,
    ):
        await to_second.send("second")
        await to_first.send("first")
        assert [await first.receive(), await second.receive()] == ["first", "second"]
    first.close()
    second.close()


async def test_sender_that_leaves_before_the_end_is_noticed(returns: ReturnSocket) -> None:
    stream = await returns.expect()
    async with await sender_to(stream.address) as sender:
        await sender.send(STARTED)
    assert await stream.receive() == STARTED
    with pytest.raises(EOFError):
        await stream.receive()
    stream.close()


async def test_sender_notices_that_the_receiver_has_left(returns: ReturnSocket) -> None:
    stream = await returns.expect()
    async with await sender_to(stream.address) as sender:
        await sender.send(STARTED)
        await stream.receive()
        stream.close()
        with pytest.raises(ConnectionError):
            await send_for_ever(sender)


@pytest.mark.parametrize("key", [bytes(16), b"short", b""])
async def test_stranger_is_turned_away(returns: ReturnSocket, key: bytes) -> None:
    stream = await returns.expect()
    reader, writer = await asyncio.open_unix_connection(stream.address.socket)
    writer.write(key)
    writer.write_eof()
    assert await reader.read() == b""
    assert not stream.connection.done()
    writer.close()
    stream.close()


async def test_key_opens_once_and_not_after_closing(returns: ReturnSocket) -> None:
    used, closed = await returns.expect(), await returns.expect()
    async with await sender_to(used.address) as sender:
        await sender.send(STARTED)
        await used.receive()
        closed.close()
        for stream in (used, closed):
            reader, writer = await asyncio.open_unix_connection(stream.address.socket)
            writer.write(stream.address.key)
            assert await reader.read() == b""
            writer.close()
    used.close()


async def test_only_the_servers_user_reaches_the_socket_and_closing_removes_it() -> None:
    returns = ReturnSocket()
    folder = Path((await returns.expect()).address.socket).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    returns.close()
    assert not folder.exists()


KILLED = """
import asyncio, os, signal
from deployments.return_path import ReturnSocket

async def die() -> None:
    returns = ReturnSocket()
    print((await returns.expect()).address.socket, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(die())
"""


def test_folder_that_a_killed_process_left_is_removed_by_the_next() -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    left_behind = Path(killed.stdout.strip())
    assert left_behind.is_socket()
    ReturnSocket().close()
    assert not left_behind.parent.exists()


def test_folder_that_is_just_being_made_stays() -> None:
    """Front ends start together, and the one would remove what the other has not locked yet."""
    with tempfile.TemporaryDirectory(prefix="gemma-serve-return-", dir="/tmp") as folder:
        ReturnSocket().close()
        assert Path(folder).is_dir()


async def test_folder_of_a_living_process_stays(returns: ReturnSocket) -> None:
    stream = await returns.expect()
    ReturnSocket().close()
    async with await sender_to(stream.address):
        stream.close()


async def test_replica_sends_past_ray_where_it_can(returns: ReturnSocket) -> None:
    stream = await returns.expect()
    over_ray = await collected(ScriptedGemma().generate(request("say Pa ris"), stream.address))
    assert over_ray == []
    assert await stream.receive() == STARTED
    assert [await stream.receive() for _ in WORDS] == WORDS
    stream.close()


@pytest.mark.parametrize("address", [None, ELSEWHERE], ids=["none", "another machine"])
async def test_replica_sends_over_ray_where_there_is_no_other_way(
    address: ReturnAddress | None,
) -> None:
    over_ray = await collected(ScriptedGemma().generate(request("say Pa ris"), address))
    assert over_ray[:3] == [STARTED, *WORDS]


async def test_replica_raises_what_keeps_a_request_from_being_admitted(
    returns: ReturnSocket,
) -> None:
    stream = await returns.expect()
    with pytest.raises(ContextLengthError):
        await collected(ScriptedGemma().generate(request("too long"), stream.address))
    stream.close()


async def test_reader_that_leaves_frees_the_place_in_the_model(returns: ReturnSocket) -> None:
    """Without Ray's word for it, which comes too."""
    gemma = ScriptedGemma()
    stream = await returns.expect()
    working = asyncio.create_task(collected(gemma.generate(request("go on"), stream.address)))
    await stream.receive()
    stream.close()
    assert await working == []
    assert await gemma.num_running() == 0
