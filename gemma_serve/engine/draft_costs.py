"""What it costs to compute drafted tokens beside those that are computed anyway."""

from dataclasses import dataclass, field
from typing import Final

from gemma_serve.engine.running_mean import RunningMean

_PRIOR: Final = 0.1
"""Of a device that reads its weights once for all tokens of a step, until it is measured."""

_MAX: Final = 2.0
"""One slow step, whatever slowed it, must not end speculation for long."""

_MIN_PLAIN_STEPS: Final = 4
"""Steps without drafts before any is tried: the first ones warm up."""

_PLAIN_WEIGHT: Final = 0.1
_COST_WEIGHT: Final = 0.2
_FORGETTING: Final = 0.001
"""By every step without drafts, so that a cost that is no longer true is measured again."""


@dataclass(slots=True)
class _Measured:
    """Steps of about the same number of sequences."""

    plain: RunningMean = field(default_factory=lambda: RunningMean(_PLAIN_WEIGHT))
    """Seconds of those without drafts."""
    cost: float = _PRIOR


class DraftCosts:
    """Learns from the steps' durations, by how many sequences decode together.

    One stream on a GPU is bound by reading the weights, and drafts are nearly free; many streams,
    or a CPU, are bound by arithmetic. Nobody has to tell.
    """

    def __init__(self) -> None:
        self._by_size: dict[int, _Measured] = {}

    def of(self, num_decoding: int) -> float | None:
        """The share of a step without drafts that each draft adds; ``None``: not known yet."""
        measured = self._measured(num_decoding)
        return measured.cost if measured.plain.count >= _MIN_PLAIN_STEPS else None

    def observe(self, num_decoding: int, num_drafts: int, duration_s: float) -> None:
        """Take in a step that computed ``num_drafts`` and one token of each sequence."""
        measured = self._measured(num_decoding)
        if num_drafts == 0:
            measured.plain.add(duration_s)
            measured.cost += (_PRIOR - measured.cost) * _FORGETTING
        elif measured.plain.value > 0:
            cost = (duration_s / measured.plain.value - 1) / num_drafts
            measured.cost += (min(max(cost, 0.0), _MAX) - measured.cost) * _COST_WEIGHT

    def _measured(self, num_decoding: int) -> _Measured:
        return self._by_size.setdefault(num_decoding.bit_length(), _Measured())
