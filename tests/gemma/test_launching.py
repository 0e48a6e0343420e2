"""What Triton needs besides itself."""

from pathlib import Path

import pytest

from gemma_serve.gemma.launching import lack_of_build_tools


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_package_to_install_is_named() -> None:
    assert "a C compiler (Debian, Ubuntu: apt install gcc" in (lack_of_build_tools() or "")


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "my-compiler")
    assert "compiler" not in (lack_of_build_tools() or "")


def test_without_pythons_headers_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))
    assert "Python's headers (Debian, Ubuntu: apt install python3-dev)" in (
        lack_of_build_tools() or ""
    )
