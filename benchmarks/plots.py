"""The comparison as pictures. Needs matplotlib: ``pip install 'gemma-serve[bench]'``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from benchmarks.comparison import METRICS, CaseResult, Metric
from benchmarks.serving_metrics import LevelSummary

_DPI: Final = 150
_MS_PER_S: Final = 1000.0


def plot_throughput(results: Sequence[CaseResult], path: Path) -> None:
    """Tokens per second over streams at once."""
    figure = _lines(results, "decode", METRICS["tok/s"], x=lambda result: result.case.size)
    axes = figure.axes[0]
    axes.set(
        title="Throughput", xlabel="streams at once", ylabel="tokens per second", ylim=(0, None)
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    figure.savefig(path, dpi=_DPI)


def plot_ttft(results: Sequence[CaseResult], path: Path) -> None:
    """Seconds to the first token over the prompt's length."""
    figure = _lines(results, "long-prompts", _ttft_s, x=_prompt_tokens)
    axes = figure.axes[0]
    axes.set(title="Time to first token", xlabel="prompt tokens", ylabel="seconds")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=_DPI)


def _ttft_s(level: LevelSummary) -> float | None:
    milliseconds = METRICS["TTFT p50"](level)
    return None if milliseconds is None else milliseconds / _MS_PER_S


def _prompt_tokens(result: CaseResult) -> int:
    """As the server counted them; one request a round."""
    return max(level.prompt_tokens for level in result.rounds) or result.case.size


def _lines(
    results: Sequence[CaseResult],
    workload: str,
    metric: Metric,
    *,
    x: Callable[[CaseResult], int],
) -> Figure:
    """One line per contender: medians, and bars from the least to the most of the rounds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for contender in dict.fromkeys(result.contender for result in results):
        points = [
            (x(result), spread)
            for result in results
            if (result.contender, result.case.workload) == (contender, workload)
            and (spread := result.spread(metric)) is not None
        ]
        if points:
            medians = [spread.median for _, spread in points]
            below = [spread.median - spread.least for _, spread in points]
            above = [spread.most - spread.median for _, spread in points]
            places = [place for place, _ in points]
            axes.errorbar(places, medians, [below, above], marker="o", capsize=3, label=contender)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
