"""What callers see while the model loads, and when it cannot be loaded."""

import asyncio
import time
from pathlib import Path

import httpx

from tests.serve.conftest import StartLoading


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
