"""A client that leaves gives back what its request held, at every moment of it."""

import asyncio
import logging

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gemma_serve.openai_api.disconnects import CancelOnDisconnect, finish_despite_cancellation
from tests.fakes import FakeGenerationClient, answer, delta
from tests.openai_api.harness import Exchange, make_app


async def test_client_that_leaves_in_the_middle_of_a_stream_closes_it() -> None:
    client = FakeGenerationClient([delta("Hel")], asyncio.Event())
    exchange = Exchange(make_app(client))
    exchange.send_body(stream=True)
    await exchange.sent_at_least(3)  # the status, the role, the first text
    exchange.leave()
    await exchange.task
    assert client.closed == [client.requests[0].request_id]
    assert exchange.sent[-1]["more_body"] is True


@pytest.mark.parametrize(("stream", "num_sent"), [(True, 2), (False, 0)])
async def test_client_that_leaves_before_the_first_token_closes_the_stream(
    stream: bool, num_sent: int
) -> None:
    client = FakeGenerationClient(asyncio.Event())
    exchange = Exchange(make_app(client))
    exchange.send_body(stream=stream)
    await client.waiting.wait()
    exchange.leave()
    await exchange.task
    assert len(client.closed) == 1
    assert len(exchange.sent) == num_sent


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_before_admission_ends_the_wait(stream: bool) -> None:
    client = FakeGenerationClient(*answer(), admission=asyncio.Event())
    exchange = Exchange(make_app(client))
    exchange.send_body(stream=stream)
    await client.waiting.wait()
    exchange.leave()
    await exchange.task
    assert exchange.sent == []


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelled_request_closes_its_stream_and_stays_cancelled(stream: bool) -> None:
    """Ray Serve says in this way that the client left."""
    client = FakeGenerationClient([delta("Hel")], asyncio.Event())
    exchange = Exchange(make_app(client))
    exchange.send_body(stream=stream)
    await client.waiting.wait()
    exchange.task.cancel()
    await asyncio.wait({exchange.task})
    assert exchange.task.cancelled()
    assert len(client.closed) == 1


async def test_client_that_is_found_gone_by_sending_closes_the_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gemma_serve")
    client = FakeGenerationClient(*answer("Hello"))
    exchange = Exchange(make_app(client), send_error=BrokenPipeError())
    exchange.send_body(stream=True)
    await exchange.task
    assert len(client.closed) == 1
    assert [line.split(" request_id=")[0] for line in caplog.messages] == ["client left"]


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_after_the_last_byte_is_no_departure(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gemma_serve")
    client = FakeGenerationClient(*answer("Hello"))
    exchange = Exchange(make_app(client))
    exchange.send_body(stream=stream)
    await exchange.task
    assert len(client.closed) == 1
    assert [line.split()[0] for line in caplog.messages] == ["finished"]


async def test_timeout_of_the_application_is_not_taken_for_a_departure() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await Exchange(CancelOnDisconnect(app)).task


async def test_application_may_still_ask_whether_the_client_is_there() -> None:
    messages = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        messages.append((await receive())["type"])
        try:
            await asyncio.Event().wait()
        finally:
            messages.append((await receive())["type"])

    exchange = Exchange(CancelOnDisconnect(app))
    exchange.send_body()
    exchange.leave()
    with pytest.raises(ClientDisconnect):
        await exchange.task
    assert messages == ["http.request", "http.disconnect"]


async def test_work_is_finished_however_often_it_is_cancelled() -> None:
    may_finish, finished = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await may_finish.wait()
        finished.set()

    task = asyncio.create_task(finish_despite_cancellation(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_finish.set()
    await asyncio.wait({task})
    assert finished.is_set()
    assert task.cancelled()


async def test_error_of_finished_work_is_raised() -> None:
    async def work() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await finish_despite_cancellation(work())
