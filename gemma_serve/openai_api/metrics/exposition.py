"""Counters and histograms, written as Prometheus reads them.

Format: https://prometheus.io/docs/instrumenting/exposition_formats (text, version 0.0.4).
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, for each combination of labels."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name = name
        self._help_text = help_text
        self._values: dict[Labels, float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(labels.items())
        self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> Iterator[str]:
        yield from _heading(self._name, self._help_text, "counter")
        for labels, value in self._values.items():
            yield sample(self._name, labels, value)


class Histogram:
    """How often values were at most as large as each of ``bounds``."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        """``bounds``: ascending."""
        self._name = name
        self._help_text = help_text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self) -> Iterator[str]:
        yield from _heading(self._name, self._help_text, "histogram")
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield sample(f"{self._name}_bucket", (("le", bound),), total)
        yield sample(f"{self._name}_sum", (), self._sum)
        yield sample(f"{self._name}_count", (), total)


def gauge(name: str, help_text: str, value: float) -> Iterator[str]:
    """A number of this moment."""
    yield from _heading(name, help_text, "gauge")
    yield sample(name, (), value)


def total(name: str, help_text: str, value: float) -> Iterator[str]:
    """A number that only grows and is counted elsewhere."""
    yield from _heading(name, help_text, "counter")
    yield sample(name, (), value)


def sample(name: str, labels: Labels, value: float) -> str:
    """One line."""
    named = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{named}}} {_number(value)}" if named else f"{name} {_number(value)}"


def document(lines: Iterable[str]) -> str:
    """All lines of a scrape."""
    return "".join(f"{line}\n" for line in lines)


def _heading(name: str, help_text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"


_ESCAPES: Final[Mapping[int, str]] = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def _escaped(text: str) -> str:
    return text.translate(_ESCAPES)


def _number(value: float) -> str:
    # Large counts exactly, which a float's shortest form would round.
    return str(int(value)) if value == int(value) else repr(value)
