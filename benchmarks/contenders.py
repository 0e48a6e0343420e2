"""The servers of the comparison: how each is started with the same model, and what it is asked.

Each keeps its own defaults, except for the length of a chat, which decides how much memory it
takes, and the threads where its default would leave cores idle; benchmarks/README.md names these.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from benchmarks.chat_client import JSONObject
from benchmarks.checkpoints import (
    demo_gguf_bf16,
    demo_gguf_q4,
    endless_demo,
    endless_demo_vision,
)
from benchmarks.peers.installation import is_installed, peer_python

ROOT: Final = Path(__file__).parents[1]
MODEL_NAME: Final = "demo"
MAX_MODEL_LEN: Final = 9216
"""Room for the longest prompt, 8,000 words, and its answer."""
MAX_NUM_SEQS: Final = 32
"""Where a server has no default of its own."""

Kind = Literal["text", "vision"]


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server."""

    port: int
    kind: Kind
    folder: Path
    """For the files of this start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A server that the comparison can start."""

    name: str
    command: Callable[[Start], list[str]]
    is_available: bool
    how_to_get: str
    model_name: Callable[[Kind], str] = lambda _: MODEL_NAME
    environment: Mapping[str, str] = field(default_factory=dict)
    extra_body: JSONObject = field(default_factory=lambda: {"ignore_eos": True})
    kinds: frozenset[Kind] = frozenset({"text"})


def contenders(peers: Path) -> dict[str, Contender]:
    """All there are, ours first. ``peers``: where others were installed."""
    all_contenders = (_ours(), *_transformers(), *_vllm(peers), *_llama_cpp(peers))
    return {contender.name: contender for contender in all_contenders}


def checkpoint(kind: Kind) -> Path:
    """The folder that everyone serves, but for those who need a GGUF file of the same weights."""
    return endless_demo() if kind == "text" else endless_demo_vision()


def _ours() -> Contender:
    return Contender(
        name="gemma-serve",
        command=_command_of_ours,
        is_available=True,
        how_to_get="",
        kinds=frozenset({"text", "vision"}),
    )


def _command_of_ours(start: Start) -> list[str]:
    settings = {
        "model": str(checkpoint(start.kind)),
        "served_model_name": MODEL_NAME,
        "max_model_len": MAX_MODEL_LEN,
        "host": "127.0.0.1",
        "port": start.port,
    }
    application = {
        "name": "gemma",
        "route_prefix": "/",
        "import_path": "serve_app:build_app",
        "args": settings,
    }
    deployment = {
        "proxy_location": "Disabled",
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [application],
    }
    path = start.folder / "serve.yaml"
    path.write_text(json.dumps(deployment, indent=2))  # JSON is YAML
    return [sys.executable, "-m", "deployments.launch", str(path)]


def _transformers() -> tuple[Contender, ...]:
    def command(start: Start, *options: str) -> list[str]:
        address = ["--host", "127.0.0.1", "--port", str(start.port), "--device", "cpu"]
        program = str(Path(sys.executable).with_name("transformers"))
        return [program, "serve", str(checkpoint(start.kind)), *address, *options]

    def make(name: str, kinds: frozenset[Kind], *options: str) -> Contender:
        return Contender(
            name=name,
            command=lambda start: command(start, *options),
            is_available=bool(find_spec("openai") and find_spec("uvicorn")),
            how_to_get="pip install 'transformers[serving]'",
            model_name=lambda kind: str(checkpoint(kind)),
            environment={"HF_HUB_OFFLINE": "1"},
            extra_body={},  # it refuses fields that it does not know
            kinds=kinds,
        )

    both: frozenset[Kind] = frozenset({"text", "vision"})
    return (
        make("transformers-serve", both),
        # Its batching takes language models only, and serves others as without.
        make("transformers-serve-batching", frozenset({"text"}), "--continuous-batching"),
    )


def _vllm(peers: Path) -> tuple[Contender, ...]:
    def command(start: Start) -> list[str]:
        return [
            str(peer_python(peers, "vllm").with_name("vllm")),
            *("serve", str(checkpoint(start.kind)), "--served-model-name", MODEL_NAME),
            *("--host", "127.0.0.1", "--port", str(start.port)),
            *("--max-model-len", str(MAX_MODEL_LEN)),
        ]

    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, 264,713 tokens: more than any workload holds
        # Its start-up asks for it: "for best performance".
        "LD_PRELOAD": str(peers / "vllm/lib/libiomp5.so"),
    }

    def make(name: str, more: Mapping[str, str]) -> Contender:
        return Contender(
            name=name,
            command=command,
            is_available=is_installed(peers, "vllm"),
            how_to_get="python -m benchmarks.peers install vllm",
            environment={**environment, **more},
        )

    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return (
        make("vllm", {}),
        # By default it computes on all cores but one, which it leaves to its front end.
        make("vllm-all-cores", {"VLLM_CPU_OMP_THREADS_BIND": cores}),
    )


def _llama_cpp(peers: Path) -> tuple[Contender, ...]:
    def make(name: str, gguf: Callable[[], Path]) -> Contender:
        return Contender(
            name=name,
            command=lambda start: [
                str(peer_python(peers, "llama.cpp")),
                str(ROOT / "benchmarks/peers/llama_cpp_server.py"),
                *(str(gguf()), str(start.port), str(MAX_MODEL_LEN), str(MAX_NUM_SEQS)),
            ],
            is_available=is_installed(peers, "llama.cpp"),
            how_to_get="python -m benchmarks.peers install llama.cpp",
        )

    return make("llama.cpp-bf16", demo_gguf_bf16), make("llama.cpp-q4", demo_gguf_q4)
