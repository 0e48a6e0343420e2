from pathlib import Path

import pytest

from benchmarks.compare import plot
from benchmarks.comparison import CaseResult
from benchmarks.serving_metrics import RequestRecord, summarise
from benchmarks.workloads import Case

pytest.importorskip("matplotlib", reason="of the extra bench")

PNG = b"\x89PNG\r\n\x1a\n"


def test_what_was_measured_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    record = RequestRecord(
        started_s=0.0, ended_s=1.0, chunk_times_s=(0.5, 1.0), prompt_tokens=9, completion_tokens=2
    )
    level = summarise(1, [record])
    decode = CaseResult("ours", Case("decode", "1 at once", 1), (level,))
    long_prompts = CaseResult("ours", Case("long-prompts", "8 words", 8), (level, level))
    for folder, results, pictures in (
        ("one", [decode], {"throughput.png"}),
        ("both", [decode, long_prompts], {"throughput.png", "ttft.png"}),
    ):
        (tmp_path / folder).mkdir()
        plot(results, tmp_path / folder)
        drawn = {path.name: path.read_bytes()[:8] for path in (tmp_path / folder).iterdir()}
        assert drawn == dict.fromkeys(pictures, PNG)
