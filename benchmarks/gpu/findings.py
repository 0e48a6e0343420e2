"""What was found, and the run that collects it."""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a finding, or its share of the ceiling, should reach."""

    limit: float
    direction: Literal["at least", "at most"] = "at least"

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.direction == "at least" else value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the table."""

    what: str
    value: float
    unit: str
    share: float | None = None
    """Of what the measured ceilings allow."""
    target: Target | None = None
    """For ``share`` if there is one, otherwise for ``value``."""

    @property
    def met(self) -> bool | None:
        compared = self.value if self.share is None else self.share
        return None if self.target is None else self.target.met_by(compared)

    def row(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%}"
        return f"{self.what:46} {self.value:12.4g} {self.unit:9} {share:>6} {self._verdict()}"

    def _verdict(self) -> str:
        if self.target is None:
            return ""
        sign = "≥" if self.target.direction == "at least" else "≤"
        shown = f"{self.target.limit:.0%}" if self.share is not None else f"{self.target.limit:g}"
        return f"{'ok ' if self.met else 'NOT'} {sign} {shown}"


@dataclass(slots=True)
class Run:
    """Parts, one after another, as long as time is left; one that fails does not end the others."""

    budget_s: float
    findings: list[Finding] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=perf_counter)

    @property
    def left_s(self) -> float:
        return self.budget_s - (perf_counter() - self._started)

    def part(self, name: str, estimate_s: float, measure: Callable[[], Iterable[Finding]]) -> None:
        """Measure it, unless it may take longer than is left. What it found before it failed stays.

        ``estimate_s``: at most.
        """
        if self.left_s < estimate_s:
            self.skipped.append(
                f"{name}: may take {estimate_s:.0f} s, {self.left_s:.0f} s are left"
            )
            print(f"-- skipped {self.skipped[-1]}", flush=True)
            return
        print(f"-- {name}", flush=True)
        begin = perf_counter()
        try:
            for finding in measure():
                self.findings.append(finding)
                print(f"   {finding.row()}", flush=True)
        except Exception as error:  # the border of a part: the others are still worth having
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.seconds[name] = perf_counter() - begin

    def print_table(self) -> None:
        print(f"\n{'':46} {'':12} {'':9} {'of ceil':>6}")
        for finding in self.findings:
            print(finding.row())
        for name, reason in self.failed.items():
            print(f"FAILED   {name}: {reason}")
        for skipped in self.skipped:
            print(f"skipped  {skipped}")
        targets = [finding.met for finding in self.findings if finding.met is not None]
        print(f"{sum(targets)} of {len(targets)} targets met")
