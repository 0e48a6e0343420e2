from pathlib import Path

import pytest

from benchmarks.comparison import CaseResult
from benchmarks.serving_metrics import RequestRecord, summarise
from benchmarks.workloads import Case

pytest.importorskip("matplotlib", reason="of the extra bench")

from benchmarks.plots import plot_throughput, plot_ttft

PNG = b"\x89PNG\r\n\x1a\n"


def test_plots_are_pictures_even_of_nothing(tmp_path: Path) -> None:
    record = RequestRecord(
        started_s=0.0, ended_s=1.0, chunk_times_s=(0.5, 1.0), prompt_tokens=9, completion_tokens=2
    )
    level = summarise(1, [record])
    results = [
        CaseResult("ours", Case("decode", "1 at once", 1), (level,)),
        CaseResult("ours", Case("long-prompts", "8 words", 8), (level, level)),
    ]
    for number, some in enumerate((results, [])):
        plot_throughput(some, tmp_path / f"throughput-{number}.png")
        plot_ttft(some, tmp_path / f"ttft-{number}.png")
    pictures = [path.read_bytes()[:8] for path in tmp_path.iterdir()]
    assert pictures == [PNG] * 4
