"""A server that a benchmark starts, waits for, and stops."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Final

import httpx

POLL_INTERVAL_S: Final = 0.5
STOP_TIMEOUT_S: Final = 60.0
_LAST_LINES: Final = 8


class ServerStartError(Exception):
    """The server ended or was not ready in time; the message holds the end of its log."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running_server(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    health_url: str,
    timeout_s: float,
) -> AsyncIterator[float]:
    """Run ``command`` in ``folder``; yield the seconds until it was healthy; stop it at the end.

    ``environment``: on top of ours. Raises ``ServerStartError``.
    """
    begin = perf_counter()
    process = _start(command, environment, folder, log)
    try:
        await _wait_until_healthy(process, health_url, timeout_s, log)
        yield perf_counter() - begin
    finally:
        _stop(process)


def _start(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


async def _wait_until_healthy(
    process: subprocess.Popen[bytes], health_url: str, timeout_s: float, log: Path
) -> None:
    deadline = perf_counter() + timeout_s
    async with httpx.AsyncClient(timeout=5) as client:
        while perf_counter() < deadline:
            if process.poll() is not None:
                raise ServerStartError(f"it ended with {process.returncode}: {_end_of(log)}")
            if await _is_healthy(client, health_url):
                return
            await asyncio.sleep(POLL_INTERVAL_S)
    raise ServerStartError(f"it was not ready within {timeout_s:.0f} s: {_end_of(log)}")


async def _is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.HTTPError:
        return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Politely; what is left of its session after that is killed.

    Not with SIGINT, which what a shell starts in the background ignores, its children too.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with suppress(ProcessLookupError):  # usually all are gone
        os.killpg(process.pid, signal.SIGKILL)
