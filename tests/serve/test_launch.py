"""The launcher as a user runs it, with a real model behind it."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from tests.serve.conftest import free_port

ROOT = Path(__file__).parents[2]

CONFIG = """
proxy_location: Disabled
logging_config: {{log_level: WARNING}}
applications:
  - import_path: serve_app:build_app
    args: {{model: "{model}", max_model_len: 64, max_num_seqs: 2, port: {port}}}
"""


def launch(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.launch", str(config)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_mistake_in_the_file_ends_it_before_ray_starts(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG.format(port=8000, model="demo").replace("max_num_seqs", "max_seqs"))
    with launch(config) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "max_seqs: there is no such setting; did you mean max_num_seqs?" in errors
    assert "starting Ray" not in errors
    assert "Traceback" not in errors


def test_port_that_is_in_use_ends_it_before_ray_starts(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as our own servers do
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config.write_text(CONFIG.format(port=port, model="demo"))
        with launch(config) as process:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"port {port} is in use" in errors
    assert "starting Ray" not in errors


def test_model_is_served_from_the_ready_line_until_an_interrupt(tmp_path: Path) -> None:
    config, port = tmp_path / "serve.yaml", free_port()
    config.write_text(CONFIG.format(port=port, model="dummy:270m"))
    url = f"http://127.0.0.1:{port}/v1"
    with launch(config) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert any(f"ready: {url} model=gemma-3-270m-dummy" in line for line in process.stderr)
        answer = httpx.post(
            f"{url}/chat/completions",
            json={
                "model": "gemma-3-270m-dummy",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 3,
                "ignore_eos": True,
            },
            timeout=60,
        )
        process.send_signal(signal.SIGINT)
        process.communicate()
        watchdog.cancel()
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert process.returncode == 0
