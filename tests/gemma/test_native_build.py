"""The kernels are compiled once for a machine, and what hinders it is said."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_serve.gemma.native import build
from gemma_serve.gemma.native.build import BuildError, load_library
from tests.gemma.native_kernels import needs_kernels


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GEMMA_SERVE_CACHE", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path / "native"
    load_library.cache_clear()


@needs_kernels
def test_they_are_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library()
    (library,) = empty_cache.iterdir()
    load_library.cache_clear()
    monkeypatch.setattr(build, "_build", pytest.fail)
    assert isinstance(load_library(), ctypes.CDLL)
    assert [*empty_cache.iterdir()] == [library]


@needs_kernels
def test_another_processor_gets_its_own(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library()
    load_library.cache_clear()
    monkeypatch.setattr(build, "_CPU_LINES", ("processor",))
    load_library()
    assert len([*empty_cache.iterdir()]) == 2


def test_a_machine_without_a_compiler_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"apt install g\+\+"):
        load_library()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('[ "$1" = --version ] || { echo "no such option" >&2; exit 1; }', "no such option"),
        ('[ "$1" = --version ] || exec sleep 10', "timed out"),
    ],
)
def test_a_compiler_that_fails_leaves_nothing_behind(
    script: str,
    reason: str,
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.5)
    with pytest.raises(BuildError, match=reason):
        load_library()
    assert not [*empty_cache.iterdir()]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("GEMMA_SERVE_CACHE", str(file))
    with pytest.raises(BuildError, match=r"could not be built: .*file"):
        load_library()
