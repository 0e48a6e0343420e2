"""A whole comparison against an endpoint that runs already, and how contenders are started."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contenders as contenders_module
from benchmarks.checkpoints import remove_stops
from benchmarks.compare import main
from benchmarks.contenders import Kind, Start, contenders


class Endpoint(BaseHTTPRequestHandler):
    """Answers every chat with as many tokens as asked, but with one less to those of 16."""

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "served"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = body["max_tokens"] - (body["max_tokens"] == 16)
        usage = {"prompt_tokens": 5, "completion_tokens": number}
        chunks: list[dict[str, Any]] = [
            *({"choices": [{"index": 0, "delta": {"content": "a"}}]} for _ in range(number)),
            {"choices": [], "usage": usage},
        ]
        self._send(b"".join(b"data: %s\n\n" % json.dumps(c).encode() for c in chunks) + DONE)

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/"
        server.shutdown()
        thread.join()


def test_comparison_prints_tables_and_writes_every_round(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        f"--endpoint fake={url} --scale smoke --rounds 2 --workloads decode short-chats "
        f"--seed 3 --out {tmp_path}".split()
    )
    assert status == 0
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert [(r["contender"], r["workload"], r["label"]) for r in results["results"]] == [
        ("fake", "decode", "1 at once"),
        ("fake", "decode", "2 at once"),
        ("fake", "short-chats", "4 at once"),
    ]
    decode, _, short = results["results"]
    assert [level["completion_tokens"] for level in decode["rounds"]] == [8, 8]
    rate = decode["over_rounds"]["tok/s"]
    assert 0 < rate["least"] <= rate["median"] <= rate["most"]
    assert short["over_rounds"] == {}
    assert [level["errors"] for level in short["rounds"]] == [
        {"asked for 16 tokens, got 15": 4},
        {"asked for 16 tokens, got 15": 4},
    ]
    assert "8 x asked for 16 tokens, got 15" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--contenders gemma-serve ollama", "unknown contenders: ollama; there are generate,"),
        ("--endpoint http://127.0.0.1:1/v1", "--endpoint must be NAME=URL, got http://127.0.0.1"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert error in capsys.readouterr().err


def test_contender_that_is_not_installed_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        f"--contenders llama.cpp-q4 --peers {tmp_path} --workloads decode --scale smoke "
        f"--out {tmp_path}".split()
    )
    assert status == 1
    how = "it is not installed: python -m benchmarks.peers install llama.cpp"
    assert how in capsys.readouterr().err
    (turn,) = json.loads((tmp_path / "comparison.json").read_text())["turns"]
    assert turn["error"] == how


@pytest.fixture
def _no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint(kind: Kind) -> Path:
        return Path("/models") / kind

    monkeypatch.setattr(contenders_module, "checkpoint", checkpoint)


@pytest.mark.usefixtures("_no_conversion")
def test_ours_is_started_from_a_deployment_of_its_own(tmp_path: Path) -> None:
    ours = contenders(tmp_path)["gemma-serve"]
    command = ours.command(Start(8123, "vision", tmp_path))
    path = tmp_path / "serve.yaml"
    assert command == [sys.executable, "-m", "deployments.launch", str(path)]
    deployment = json.loads(path.read_text())
    assert deployment["proxy_location"] == "Disabled"
    assert deployment["applications"][0]["args"] == {
        "model": "/models/vision",
        "served_model_name": "demo",
        "max_model_len": 9216,
        "host": "127.0.0.1",
        "port": 8123,
    }


@pytest.mark.usefixtures("_no_conversion")
def test_every_server_binds_to_this_machine_only(tmp_path: Path) -> None:
    for name in ("vllm", "vllm-all-cores", "transformers-serve", "transformers-serve-batching"):
        command = contenders(tmp_path)[name].command(Start(8123, "text", tmp_path))
        assert "--host 127.0.0.1 --port 8123" in " ".join(command), name


def test_checkpoint_without_stops_keeps_everything_else(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "endless"
    source.mkdir()
    folder.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "SHA256SUMS").write_text("sums of the source")
    (source / "config.json").write_text('{"hidden_size": 640, "eos_token_id": 1}')
    generation = {"eos_token_id": [1], "stop_strings": ["END"], "top_k": 64, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation | {"bos_token_id": 2}))

    remove_stops(source, folder)

    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "config.json").read_text()) == {"hidden_size": 640}
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"bos_token_id": 2, "do_sample": False}
