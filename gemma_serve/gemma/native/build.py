"""Compiles the kernels for the machine they run on, once, and loads them."""

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from shutil import which
from typing import Final

from gemma_serve.gemma.checkpoint_cache import cache_folder

logger = logging.getLogger(__name__)

_FOLDER: Final = Path(__file__).parent
_SOURCES: Final = ("norms.cpp", "attention.cpp", "tile_products.cpp", "vector_products.cpp")
_HEADERS: Final = ("numbers.h", "products.h")
_COMPILE_FLAGS: Final = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
_TIMEOUT_S: Final = 120.0
_OPENMP_LIBRARIES: Final = ("libgomp", "libiomp5", "libomp")
_CPU_LINES: Final = ("model name", "flags", "Features", "CPU implementer", "CPU part")


class BuildError(Exception):
    """Why there are no kernels; what it says may be shown to users."""


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels. The first time on a machine it takes seconds.

    Raises ``BuildError``.
    """
    compiler = os.environ.get("CXX") or which("g++")
    if compiler is None:
        raise BuildError("it needs a C++ compiler (Debian, Ubuntu: apt install g++)")
    openmp = _openmp_of_torch()
    try:
        path = cache_folder() / "native" / f"{_fingerprint(compiler, openmp)}.so"
        if not path.exists():
            _build(path, compiler, openmp)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{compiler} failed: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"it could not be built: {error}") from error


def _build(path: Path, compiler: str, openmp: Path) -> None:
    logger.info("compiling kernels for this machine, once")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{folder}/{source}.o" for source in _SOURCES]
        for source, compiled in zip(_SOURCES, objects, strict=True):
            _run(compiler, *_COMPILE_FLAGS, "-c", str(_FOLDER / source), "-o", compiled)
        # Not with -fopenmp, which would bring a second runtime with threads of its own.
        library = f"{folder}/{path.name}"
        _run(compiler, "-shared", *objects, str(openmp), "-o", library)
        os.replace(library, path)  # whole or not at all, whoever else builds it


def _run(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
    ).stdout


def _openmp_of_torch() -> Path:
    """The runtime that torch has loaded, whose threads the kernels share."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise BuildError(f"it is for Linux: {error}") from error
    for line in mapped:
        path = Path(line.rpartition(" ")[2])
        if path.name.startswith(_OPENMP_LIBRARIES):
            return path
    raise BuildError("this torch computes without OpenMP")


def _fingerprint(compiler: str, openmp: Path) -> str:
    """Names what the kernels were built from and for."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if line.startswith(_CPU_LINES)
    ]
    of_text = (*_COMPILE_FLAGS, _run(compiler, "--version"), str(openmp), *cpu)
    digest.update("\n".join(of_text).encode())
    return digest.hexdigest()[:32]
