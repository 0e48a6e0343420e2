"""Which part may import which: the layers stay apart only as long as somebody looks."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SERVER = ("ray", "config", "deployments", "serve_app")
HTTP = ("fastapi", "pydantic", "starlette", "uvicorn", "gemma_serve.openai_api")
MODEL = ("torch", "transformers", "accelerate", "gemma_serve.engine", "gemma_serve.gemma")
OUTSIDE = ("torch", "transformers", "numpy", "PIL", "httpx")

# Folder or module: what nothing in it may import.
FORBIDDEN = {
    "gemma_serve": SERVER,
    "gemma_serve/generation.py": HTTP + MODEL + OUTSIDE,
    "gemma_serve/messages.py": HTTP + MODEL + OUTSIDE,
    "gemma_serve/errors.py": HTTP + MODEL + OUTSIDE,
    "gemma_serve/engine/config.py": HTTP + OUTSIDE,
    "gemma_serve/openai_api": MODEL,
    "gemma_serve/images": MODEL + HTTP,
    "gemma_serve/engine": (
        *HTTP,
        "llguidance",
        "numpy",
        "transformers",
        "accelerate",
        "gemma_serve.gemma",
    ),
    "gemma_serve/tool_calling": HTTP + MODEL + OUTSIDE,
    "gemma_serve/gemma": HTTP,
    "config": ("ray", "torch", "transformers", "deployments", "serve_app"),
    "deployments": ("serve_app",),
}


def imports_of(path: Path) -> Iterator[str]:
    """Full names of the modules that ``path`` imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize(("part", "forbidden"), FORBIDDEN.items())
def test_part_imports_nothing_that_it_must_do_without(
    part: str, forbidden: tuple[str, ...]
) -> None:
    top = ROOT / part
    offences = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (top.rglob("*.py") if top.is_dir() else [top])
        for module in imports_of(path)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    ]
    assert offences == []


def test_of_the_engine_only_the_sampler_and_its_transfers_know_torch() -> None:
    top = ROOT / "gemma_serve/engine"
    knowing = {
        path.relative_to(top).parts[0]
        for path in top.rglob("*.py")
        if "torch" in {module.partition(".")[0] for module in imports_of(path)}
    }
    assert knowing <= {"sampling", "transfers.py"}


def test_wiring_the_application_loads_no_torch() -> None:
    # A process of its own: other tests of this one have loaded it.
    code = "import sys, serve_app, deployments.ingress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
