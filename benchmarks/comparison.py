"""What a comparison measured, and its tables."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.serving_metrics import LevelSummary
from benchmarks.workloads import Case

Metric = Callable[[LevelSummary], float | None]

METRICS: Final[dict[str, Metric]] = {
    "tok/s": lambda level: level.output_tokens_per_s,
    "TTFT p50": lambda level: level.time_to_first_token.p50_ms,
    "TTFT p95": lambda level: level.time_to_first_token.p95_ms,
    "ITL p50": lambda level: level.inter_token_latency.p50_ms,
    "ITL p95": lambda level: level.inter_token_latency.p95_ms,
}


@dataclass(frozen=True, slots=True)
class Spread:
    """One metric over the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case of one contender, measured once a round."""

    contender: str
    case: Case
    rounds: tuple[LevelSummary, ...]

    def spread(self, metric: Metric) -> Spread | None:
        """``None`` if no round has a value. Rounds with failed requests have none."""
        valid = [level for level in self.rounds if not level.num_errors]
        values = [value for level in valid if (value := metric(level)) is not None]
        return Spread(statistics.median(values), min(values), max(values)) if values else None

    @property
    def errors(self) -> dict[str, int]:
        """How often each error came in all rounds."""
        counts: dict[str, int] = {}
        for level in self.rounds:
            for error, count in level.errors.items():
                counts[error] = counts.get(error, 0) + count
        return counts


@dataclass(frozen=True, slots=True)
class DecodeBound:
    """One stream's decode step beside the time that reading the weights takes."""

    contender: str
    step_ms: float
    bound_ms: float


def decode_bounds(results: Iterable[CaseResult], bound_ms: float) -> list[DecodeBound]:
    """One for each contender that was measured with one stream."""
    bounds = []
    for result in results:
        if result.case.workload == "decode" and result.case.size == 1:
            step = result.spread(lambda level: level.time_per_output_token.p50_ms)
            if step is not None:
                bounds.append(DecodeBound(result.contender, step.median, bound_ms))
    return bounds


def cold_shares(results: Sequence[CaseResult]) -> dict[tuple[str, str], float]:
    """TTFT of the warm case over that of the cold one, by contender and workload.

    The median of the rounds' ratios: both of a round come right after each other.
    """
    by_key: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        if result.case.workload in ("chat", "image-chat", "prefix"):
            by_key.setdefault((result.contender, result.case.workload), []).append(result)
    shares = {}
    for key, pair in by_key.items():
        if len(pair) == 2 and (ratios := _ttft_ratios(*pair)):
            shares[key] = statistics.median(ratios)
    return shares


def _ttft_ratios(cold: CaseResult, warm: CaseResult) -> list[float]:
    pairs = zip(cold.rounds, warm.rounds, strict=False)  # a run may be stopped between them
    return [
        after / before
        for first, second in pairs
        if (before := first.time_to_first_token.p50_ms)
        and (after := second.time_to_first_token.p50_ms)
    ]


def format_results(results: Sequence[CaseResult]) -> str:
    """One table per workload, its cases in order, the contenders of a case side by side."""
    workloads = dict.fromkeys(result.case.workload for result in results)
    return "\n\n".join(
        f"{workload}\n{_table([r for r in results if r.case.workload == workload])}"
        for workload in workloads
    )


def format_bounds(bounds: Sequence[DecodeBound]) -> str:
    """How far each contender is from the bound."""
    rows = [("one stream", "ms/token", "bound ms", "ratio")]
    for b in bounds:
        ratio = b.step_ms / b.bound_ms
        rows.append((b.contender, f"{b.step_ms:.1f}", f"{b.bound_ms:.1f}", f"{ratio:.2f}"))
    return align(rows)


def format_shares(shares: Mapping[tuple[str, str], float]) -> str:
    """What the second turn and the next users wait, in parts of the first's."""
    rows = [("", "", "TTFT, warm over cold")]
    for (contender, workload), share in shares.items():
        rows.append((contender, workload, f"{share:.1%}"))
    return align(rows)


def _table(results: Sequence[CaseResult]) -> str:
    cases = dict.fromkeys(result.case for result in results)
    head = ("", "contender", "prompt", "tok/s", "[min", "max]", *list(METRICS)[1:], "")
    rows = [head]
    for case in cases:
        rows += [_row(result) for result in results if result.case == case]
    return align(rows)


def _row(result: CaseResult) -> tuple[str, ...]:
    rate = result.spread(METRICS["tok/s"])
    latencies = [result.spread(metric) for name, metric in METRICS.items() if name != "tok/s"]
    first = result.rounds[0]
    num_finished = first.num_requests - first.num_errors
    return (
        result.case.label,
        result.contender,
        str(round(first.prompt_tokens / num_finished)) if num_finished else "-",
        *((f"{value:.1f}" for value in (rate.median, rate.least, rate.most)) if rate else "---"),
        *(f"{spread.median:.0f}" if spread else "-" for spread in latencies),
        "; ".join(f"{count} x {error[:60]}" for error, count in result.errors.items()),
    )


def align(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
