import pytest

from benchmarks.serving_metrics import (
    LevelSummary,
    Percentiles,
    RequestRecord,
    format_table,
    percentile,
    summarise,
)


def make_record(*, started_s: float = 0.0) -> RequestRecord:
    """Three chunks of five tokens, 0.5 s to the first, then 0.1 s and 0.3 s."""
    return RequestRecord(
        started_s=started_s,
        ended_s=started_s + 1.0,
        chunk_times_s=(started_s + 0.5, started_s + 0.6, started_s + 0.9),
        prompt_tokens=10,
        completion_tokens=5,
    )


def failed(error: str, *, ended_s: float = 1.0) -> RequestRecord:
    return RequestRecord(
        started_s=0.0, ended_s=ended_s, chunk_times_s=(0.001,), completion_tokens=1, error=error
    )


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 10.0), (0.25, 17.5), (0.5, 25.0), (0.9, 37.0), (1.0, 40.0)]
)
def test_percentile_interpolates_between_neighbours(share: float, expected: float) -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], share) == pytest.approx(expected)


def test_percentile_of_one_value_is_that_value() -> None:
    assert percentile([3.0], 0.99) == 3.0


def test_percentiles_sort_and_turn_to_milliseconds() -> None:
    spread = Percentiles.of([0.003, 0.001, 0.002])
    assert (spread.p50_ms, spread.p95_ms, spread.p99_ms) == pytest.approx((2.0, 2.9, 2.98))


def test_percentiles_of_nothing_are_unknown() -> None:
    assert Percentiles.of([]) == Percentiles(None, None, None)


def test_times_of_one_request() -> None:
    record = make_record(started_s=100.0)
    assert record.time_to_first_token_s == pytest.approx(0.5)
    assert record.inter_token_latencies_s == pytest.approx([0.1, 0.3])
    assert record.time_per_output_token_s == pytest.approx(0.1)


def test_times_of_a_request_without_text_are_unknown() -> None:
    record = RequestRecord(started_s=0.0, ended_s=1.0, completion_tokens=5)
    assert record.time_to_first_token_s is None
    assert record.inter_token_latencies_s == []
    assert record.time_per_output_token_s is None


def test_rates_span_from_first_start_to_last_end() -> None:
    summary = summarise(2, [make_record(started_s=7.0), make_record(started_s=8.0)])
    assert summary.duration_s == pytest.approx(2.0)
    assert summary.requests_per_s == pytest.approx(1.0)
    assert summary.output_tokens_per_s == pytest.approx(5.0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (20, 10)


def test_failed_requests_are_counted_by_error_and_nowhere_else() -> None:
    records = [make_record(), failed("broken"), failed("refused", ended_s=2.0), failed("broken")]
    summary = summarise(4, records)
    assert (summary.num_requests, summary.num_errors) == (4, 3)
    assert summary.errors == {"broken": 2, "refused": 1}
    assert (summary.requests_per_s, summary.output_tokens_per_s) == (0.5, 2.5)
    assert summary.time_to_first_token.p50_ms == pytest.approx(500.0)


def test_level_where_everything_failed_has_no_latencies() -> None:
    summary = summarise(1, [failed("broken")])
    assert (summary.requests_per_s, summary.output_tokens_per_s) == (0.0, 0.0)
    assert summary.inter_token_latency == Percentiles(None, None, None)


def make_level(concurrency: int, latency_ms: float | None) -> LevelSummary:
    spread = Percentiles(latency_ms, latency_ms, latency_ms)
    return LevelSummary(
        concurrency=concurrency,
        num_requests=32,
        num_errors=0,
        errors={},
        duration_s=10.0,
        prompt_tokens=320,
        completion_tokens=12345,
        requests_per_s=3.2,
        output_tokens_per_s=1234.5,
        time_to_first_token=spread,
        inter_token_latency=spread,
        time_per_output_token=spread,
    )


def test_table_is_aligned() -> None:
    assert format_table([make_level(1, 12.34), make_level(16, None)]).splitlines() == [
        "users  reqs  errors  req/s   tok/s  TTFT p50   p95   p99  ITL p50   p95   p99  TPOT p50",
        "    1    32       0   3.20  1234.5      12.3  12.3  12.3     12.3  12.3  12.3      12.3",
        "   16    32       0   3.20  1234.5         -     -     -        -     -     -         -",
    ]
