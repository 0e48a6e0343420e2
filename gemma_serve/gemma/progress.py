"""Progress of long work, as a few log lines."""

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Final

logger = logging.getLogger(__name__)

_STEP_PERCENT: Final = 10
_MIN_INTERVAL_S: Final = 2.0  # quick work needs no lines


class Progress:
    """Logs ``what`` with percent and seconds: every ten percent, every two seconds at most."""

    def __init__(self, what: str, total: int, *, clock: Callable[[], float] = perf_counter) -> None:
        self._what = what
        self._total = total
        self._clock = clock
        self._done = 0
        self._next_percent = _STEP_PERCENT
        self._start_s = self._logged_s = clock()

    def advance(self, amount: int) -> None:
        """Another ``amount`` of ``total`` is done."""
        self._done += amount
        percent = 100 * self._done // self._total
        now_s = self._clock()
        if percent < self._next_percent or now_s < self._logged_s + _MIN_INTERVAL_S:
            return
        self._next_percent = percent - percent % _STEP_PERCENT + _STEP_PERCENT
        self._logged_s = now_s
        logger.info("%s: %d %%, %.0f s", self._what, percent, now_s - self._start_s)
