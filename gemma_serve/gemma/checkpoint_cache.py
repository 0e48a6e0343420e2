"""Checkpoints that were converted on this machine: built once, whole or not at all."""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gemma_serve.errors import CheckpointError

logger = logging.getLogger(__name__)

CHECKSUMS_FILE: Final = "SHA256SUMS"
"""Written last; ``sha256sum -c`` reads it too."""
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """``$GEMMA_SERVE_CACHE``, or ``gemma-serve`` where the XDG base directories keep caches."""
    if chosen := os.environ.get("GEMMA_SERVE_CACHE"):
        return Path(chosen).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "gemma-serve"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``name``; if it is missing or damaged, let ``build`` fill it.

    ``build`` gets an empty folder elsewhere, which takes its place only when it is complete. Other
    processes that want the same folder wait meanwhile.
    """
    root = cache_folder()
    folder = root / name
    try:
        if _is_intact(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(root / f"{name}.lock", name):
            if not _is_intact(folder):
                _replace(folder, build)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {name} to the cache folder {root}: {error}. Make room there, or set "
            "GEMMA_SERVE_CACHE to a folder with space"
        ) from error
    return folder


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        lines = (folder / CHECKSUMS_FILE).read_text().splitlines()
        intact = bool(lines) and all(_matches(folder, line) for line in lines)
    except OSError:
        intact = False
    if not intact:
        logger.warning("%s is damaged and will be built again", folder)
    return intact


def _matches(folder: Path, line: str) -> bool:
    digest, _, file_name = line.partition("  ")
    return sha256_of(folder / file_name) == digest


@contextmanager
def _exclusive_lock(path: Path, name: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is building %s: waiting for it", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(folder: Path, build: Callable[[Path], None]) -> None:
    """Build beside ``folder`` and rename. The caller holds the lock."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
        built = Path(temporary) / "checkpoint"
        built.mkdir()
        _fill(built, build, folder.name)
        _write_checksums(built)
        if folder.exists():
            folder.rename(Path(temporary) / "damaged")
        built.rename(folder)


def _fill(folder: Path, build: Callable[[Path], None], name: str) -> None:
    try:
        build(folder)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        # It may as well be what it is built from that cannot be read.
        raise CheckpointError(f"cannot build {name}: {error}") from error


def _write_checksums(folder: Path) -> None:
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS_FILE).write_text("".join(lines))
