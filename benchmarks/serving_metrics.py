"""What a load test measured: per request, per concurrency level, and as a table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Self

HEAD: Final = (
    *("users", "reqs", "errors", "req/s", "tok/s"),
    *("TTFT p50", "p95", "p99"),
    *("ITL p50", "p95", "p99"),
    "TPOT p50",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One streamed request. Times are seconds of one monotonic clock."""

    started_s: float
    ended_s: float
    chunk_times_s: tuple[float, ...] = ()
    """When each chunk with text came."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str | None = None
    """Why it failed; its times and tokens count for nothing then."""

    @property
    def time_to_first_token_s(self) -> float | None:
        return self.chunk_times_s[0] - self.started_s if self.chunk_times_s else None

    @property
    def inter_token_latencies_s(self) -> list[float]:
        """Gaps between neighbouring chunks: what a reader sees. A chunk may hold many tokens."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times_s)]

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of a token after the first, however the server bundles them."""
        if not self.chunk_times_s or self.completion_tokens < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Spread of some latencies, in milliseconds; ``None`` where nothing was measured."""

    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Self:
        ordered = sorted(values_s)
        if not ordered:
            return cls(None, None, None)
        return cls(*(1000 * percentile(ordered, share) for share in (0.5, 0.95, 0.99)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSummary:
    """All requests of one concurrency level. Rates count finished requests only."""

    concurrency: int
    num_requests: int
    num_errors: int
    errors: dict[str, int]
    """How often each error came."""
    duration_s: float
    """From the first request's start to the last one's end."""
    prompt_tokens: int
    completion_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token: Percentiles
    inter_token_latency: Percentiles
    time_per_output_token: Percentiles


def percentile(ordered: Sequence[float], share: float) -> float:
    """Interpolate between the two nearest of ``ordered`` (ascending), as numpy does by default."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def summarise(concurrency: int, records: Sequence[RequestRecord]) -> LevelSummary:
    """Summarise one level's ``records``, of which there is at least one."""
    finished = [record for record in records if record.error is None]
    errors = Counter(record.error for record in records if record.error is not None)
    duration_s = max(r.ended_s for r in records) - min(r.started_s for r in records)
    completion_tokens = sum(record.completion_tokens for record in finished)
    return LevelSummary(
        concurrency=concurrency,
        num_requests=len(records),
        num_errors=errors.total(),
        errors=dict(errors),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens for record in finished),
        completion_tokens=completion_tokens,
        requests_per_s=len(finished) / duration_s,
        output_tokens_per_s=completion_tokens / duration_s,
        time_to_first_token=Percentiles.of(_known(r.time_to_first_token_s for r in finished)),
        inter_token_latency=Percentiles.of(
            [gap for record in finished for gap in record.inter_token_latencies_s]
        ),
        time_per_output_token=Percentiles.of(_known(r.time_per_output_token_s for r in finished)),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def format_table(levels: Sequence[LevelSummary]) -> str:
    """Return a head and one aligned line per level; latencies are milliseconds."""
    rows = [HEAD, *(_row(level) for level in levels)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(level: LevelSummary) -> tuple[str, ...]:
    spreads = (level.time_to_first_token, level.inter_token_latency)
    latencies = [ms for p in spreads for ms in (p.p50_ms, p.p95_ms, p.p99_ms)]
    return (
        str(level.concurrency),
        str(level.num_requests),
        str(level.num_errors),
        f"{level.requests_per_s:.2f}",
        f"{level.output_tokens_per_s:.1f}",
        *(_cell(ms) for ms in (*latencies, level.time_per_output_token.p50_ms)),
    )


def _cell(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.1f}"
