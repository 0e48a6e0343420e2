"""A server's life from its start to its end, with small servers in Python."""

import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.server_process import ServerStartError, free_port, running_server

HEALTHY = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["GREETING"].encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def fetch(url: str) -> str:
    async with httpx.AsyncClient() as client:
        return (await client.get(url)).text


async def test_server_is_yielded_healthy_and_gone_afterwards(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/health"
    async with running_server(
        [sys.executable, "-c", HEALTHY, str(port)],
        environment={"GREETING": "hello"},
        folder=tmp_path,
        log=tmp_path / "log",
        health_url=url,
        timeout_s=60,
    ) as startup_s:
        assert startup_s > 0
        assert await fetch(url) == "hello"
    with pytest.raises(httpx.ConnectError):
        await fetch(url)


async def test_server_that_ends_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import sys; print('loading'); sys.exit('no such model')"
    with pytest.raises(ServerStartError, match=r"it ended with 1: (loading\n)?no such model"):
        async with running_server(
            [sys.executable, "-c", code],
            environment={},
            folder=tmp_path,
            log=tmp_path / "log",
            health_url=f"http://127.0.0.1:{free_port()}/health",
            timeout_s=60,
        ):
            pass


async def test_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="it was not ready within 0 s"):
        async with running_server(
            [sys.executable, "-c", "import time; time.sleep(600)"],
            environment={},
            folder=tmp_path,
            log=tmp_path / "log",
            health_url=f"http://127.0.0.1:{free_port()}/health",
            timeout_s=0.01,
        ):
            pass
