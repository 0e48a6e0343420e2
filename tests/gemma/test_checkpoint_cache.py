import errno
import logging
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.checkpoint_cache import build_once, cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_SERVE_CACHE", str(tmp_path))
    return tmp_path


class Builder:
    """Writes one file, and counts."""

    def __init__(self) -> None:
        self.num_builds = 0

    def __call__(self, folder: Path) -> None:
        self.num_builds += 1
        (folder / "weights").write_bytes(b"12345678")


def test_cache_folder_honours_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == tmp_path
    monkeypatch.delenv("GEMMA_SERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/gemma-serve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "gemma-serve"


def test_second_call_builds_nothing(cache: Path) -> None:
    builder = Builder()
    assert build_once("x", builder) == build_once("x", builder) == cache / "x"
    assert builder.num_builds == 1


@pytest.mark.parametrize("damage", [b"1234567", b"1234567X"], ids=["cut", "flipped"])
def test_damaged_file_is_rebuilt(damage: bytes) -> None:
    builder = Builder()
    weights = build_once("x", builder) / "weights"
    weights.write_bytes(damage)
    build_once("x", builder)
    assert (weights.read_bytes(), builder.num_builds) == (b"12345678", 2)


def test_folder_without_checksums_is_rebuilt(cache: Path) -> None:
    (cache / "x").mkdir()
    builder = Builder()
    build_once("x", builder)
    assert builder.num_builds == 1


def test_failed_build_leaves_nothing_behind(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"1234")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        build_once("x", fail)
    assert [path.name for path in cache.iterdir()] == ["x.lock"]


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    (cache / ".x-abc" / "checkpoint").mkdir(parents=True)
    build_once("x", Builder())
    assert sorted(path.name for path in cache.iterdir()) == ["x", "x.lock"]


def test_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("GEMMA_SERVE_CACHE", str(blocked / "cache"))
    with pytest.raises(CheckpointError, match="set GEMMA_SERVE_CACHE to a folder"):
        build_once("x", Builder())


def build_error(number: int) -> str:
    """What becomes of a build that fails with the system's error ``number``."""

    def fail(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(CheckpointError) as caught:
        build_once("x", fail)
    return str(caught.value)


def test_only_a_full_disk_asks_for_room() -> None:
    assert "No space left on device. Make room there" in build_error(errno.ENOSPC)
    assert build_error(errno.EACCES) == "cannot build x: [Errno 13] Permission denied"


def hold_lock_until(release: Event, building: Event) -> None:
    def build(folder: Path) -> None:
        building.set()
        release.wait()
        (folder / "weights").write_bytes(b"other")

    build_once("x", build)


def test_second_process_waits_for_the_first_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    spawn = multiprocessing.get_context("spawn")
    release, building = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold_lock_until, args=(release, building))
    other.start()
    building.wait()

    class ReleaseOnWait(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for it" in record.getMessage():
                release.set()

    logger = logging.getLogger("gemma_serve.gemma.checkpoint_cache")
    handler = ReleaseOnWait()
    logger.addHandler(handler)
    builder = Builder()
    try:
        with caplog.at_level(logging.INFO):
            folder = build_once("x", builder)
    finally:
        logger.removeHandler(handler)
        release.set()
        other.join()
    assert (builder.num_builds, (folder / "weights").read_bytes()) == (0, b"other")
    assert "another process is building x: waiting for it" in caplog.text
