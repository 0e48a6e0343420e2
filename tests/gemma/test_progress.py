import logging
from collections.abc import Iterable, Iterator

import pytest

from gemma_serve.gemma.progress import Progress


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="gemma_serve.gemma.progress"):
        yield


def work(times_s: Iterable[float], *, total: int) -> None:
    """Advance by one at each of ``times_s``, the first of which is the start."""
    clock = iter(times_s)
    progress = Progress("reading", total, clock=lambda: next(clock))
    for _ in range(total):
        progress.advance(1)


def test_slow_work_is_logged_every_ten_percent(caplog: pytest.LogCaptureFixture) -> None:
    work(range(0, 63, 3), total=20)
    percents = [f"reading: {10 * i} %, {6 * i} s" for i in range(1, 11)]
    assert caplog.messages == percents


def test_quick_work_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    work([i / 100 for i in range(101)], total=100)
    assert caplog.messages == []


def test_lines_are_two_seconds_apart(caplog: pytest.LogCaptureFixture) -> None:
    work(range(6), total=5)
    assert caplog.messages == ["reading: 40 %, 2 s", "reading: 80 %, 4 s"]
