"""What it costs to compute drafted tokens beside those that are computed anyway."""

from dataclasses import dataclass
from typing import Final

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

    num_plain_steps: int = 0
    plain_s: float = 0.0
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
        return measured.cost if measured.num_plain_steps >= _MIN_PLAIN_STEPS else None

    def observe(self, num_decoding: int, num_drafts: int, duration_s: float) -> None:
        """Take in a step that computed ``num_drafts`` and one token of each sequence."""
        measured = self._measured(num_decoding)
        if num_drafts == 0:
            measured.num_plain_steps += 1
            weight = max(_PLAIN_WEIGHT, 1 / measured.num_plain_steps)
            measured.plain_s += (duration_s - measured.plain_s) * weight
            measured.cost += (_PRIOR - measured.cost) * _FORGETTING
        elif measured.plain_s > 0:
            cost = (duration_s / measured.plain_s - 1) / num_drafts
            measured.cost += (min(max(cost, 0.0), _MAX) - measured.cost) * _COST_WEIGHT

    def _measured(self, num_decoding: int) -> _Measured:
        return self._by_size.setdefault(num_decoding.bit_length(), _Measured())
