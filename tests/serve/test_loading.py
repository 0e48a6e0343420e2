"""What callers see while the model loads, and when it cannot be loaded."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
from ray import serve

from tests.serve.conftest import StartLoading
from tests.serve.test_streaming import chat


async def wait_for_health(client: httpx.AsyncClient, message: str) -> httpx.Response:
    """Ask until the ingress is up and its answer holds ``message``."""
    async with asyncio.timeout(20):
        while message not in (response := await client.get("/health")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return response


async def test_server_says_503_at_once_until_the_model_is_loaded(
    start_loading: StartLoading, tmp_path: Path
) -> None:
    url = start_loading("loading", tmp_path / "may_finish")
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        response = await wait_for_health(client, "still loading")
        asked = time.perf_counter()
        await client.get("/health")
        assert time.perf_counter() - asked < 5
        assert response.status_code == 503
        (tmp_path / "may_finish").write_text("succeed")
        assert (await wait_for_health(client, "ok")).status_code == 200


async def test_server_says_that_its_model_could_not_be_loaded(
    start_loading: StartLoading, tmp_path: Path
) -> None:
    (tmp_path / "may_finish").write_text("fail")
    url = start_loading("failing", tmp_path / "may_finish")
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        response = await wait_for_health(client, "could not be loaded")
    assert response.status_code == 503


async def test_health_tells_that_the_only_replica_died_and_a_chat_waits_for_the_next(
    start_loading: StartLoading, tmp_path: Path
) -> None:
    """``/health`` went on saying 200, and chats got a 503 after a second."""
    may_finish = tmp_path / "may_finish"
    may_finish.write_text("succeed")
    url = start_loading("restarting", may_finish)
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        await wait_for_health(client, "ok")
        may_finish.unlink()
        gemma = serve.get_deployment_handle("SlowlyLoadingGemma", "restarting")
        os.kill(await gemma.pid.remote(), signal.SIGKILL)
        assert (await wait_for_health(client, "error")).status_code == 503
        waiting = asyncio.create_task(
            client.post("/v1/chat/completions", json=chat("say again", stream=False))
        )
        assert (await client.get("/health")).status_code == 503
        may_finish.write_text("succeed")
        assert (await waiting).json()["choices"][0]["message"]["content"] == "again"
        assert (await wait_for_health(client, "ok")).status_code == 200
