"""What the tables of a comparison say."""

import pytest

from benchmarks.comparison import (
    METRICS,
    CaseResult,
    DecodeBound,
    Spread,
    cold_shares,
    decode_bounds,
    format_bounds,
    format_results,
    format_shares,
)
from benchmarks.serving_metrics import LevelSummary, RequestRecord, summarise
from benchmarks.workloads import Case

DECODE = Case("decode", "1 at once", 1)


def make_round(ttft_s: float, error: str | None = None) -> LevelSummary:
    """One request of 10 prompt tokens: 3 tokens, the last two 0.25 s apart."""
    times_s = (ttft_s, ttft_s + 0.25, ttft_s + 0.5)
    record = RequestRecord(
        started_s=0.0,
        ended_s=times_s[-1],
        chunk_times_s=times_s,
        prompt_tokens=10,
        completion_tokens=3,
        error=error,
    )
    return summarise(1, [record])


def make_result(*rounds: LevelSummary, name: str = "ours", case: Case = DECODE) -> CaseResult:
    return CaseResult(name, case, rounds)


def test_spread_is_the_median_between_least_and_most() -> None:
    result = make_result(make_round(0.5), make_round(1.0), make_round(2.5))
    assert result.spread(METRICS["tok/s"]) == Spread(2.0, 1.0, 3.0)
    assert result.spread(METRICS["TTFT p50"]) == Spread(1000.0, 500.0, 2500.0)


def test_rounds_with_failures_count_only_as_errors() -> None:
    result = make_result(make_round(0.5), make_round(9.0, error="busy"))
    assert result.spread(METRICS["tok/s"]) == Spread(3.0, 3.0, 3.0)
    assert result.errors == {"busy": 1}


def test_case_that_always_failed_has_no_spread() -> None:
    assert make_result(make_round(1.0, error="busy")).spread(METRICS["tok/s"]) is None


def test_decode_bound_is_of_one_stream_only() -> None:
    results = [
        make_result(make_round(1.0)),
        make_result(make_round(1.0), case=Case("decode", "8 at once", 8)),
        make_result(make_round(1.0), case=Case("long-prompts", "1 words", 1)),
    ]
    (bound,) = decode_bounds(results, bound_ms=100.0)
    assert bound == DecodeBound("ours", 250.0, 100.0)
    assert format_bounds([bound]).splitlines() == [
        "one stream  ms/token  bound ms  ratio",
        "ours        250.0        100.0   2.50",
    ]


def test_warm_share_is_the_median_of_the_rounds_ratios() -> None:
    cold = Case("chat", "first turn (cold)", 3000)
    warm = Case("chat", "second turn", 3000)
    results = [
        make_result(make_round(1.0), make_round(2.0), make_round(4.0), case=cold),
        make_result(make_round(0.1), make_round(0.4), make_round(0.2), case=warm),
    ]
    shares = cold_shares(results)
    assert shares == {("ours", "chat"): pytest.approx(0.1)}
    assert format_shares(shares).splitlines()[1].split() == ["ours", "chat", "10.0%"]


def test_round_whose_turn_failed_has_no_warm_share() -> None:
    results = [
        make_result(make_round(1.0, error="busy"), case=Case("prefix", "cold", 1)),
        make_result(make_round(0.1), case=Case("prefix", "next", 1)),
    ]
    assert cold_shares(results) == {}


def test_table_sets_contenders_of_a_case_side_by_side() -> None:
    eight = Case("decode", "8 at once", 8)
    results = [
        make_result(make_round(0.5)),
        make_result(make_round(0.5), case=eight),
        make_result(make_round(1.0), name="other"),
        make_result(make_round(1.0, error="busy"), name="other", case=eight),
    ]
    assert [line.split("  ")[0] for line in format_results(results).splitlines()] == [
        "decode",
        "",
        *("1 at once", "1 at once", "8 at once", "8 at once"),
    ]
    first, *_, failed = format_results(results).splitlines()[2:]
    assert " ".join(first.split()) == "1 at once ours 10 3.0 3.0 3.0 500 500 250 250"
    assert " ".join(failed.split()) == "8 at once other - - - - - - - - 1 x busy"
