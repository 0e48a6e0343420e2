"""What is measured over and over, while what it depends on may change."""


class RunningMean:
    """Of all values at first, then of the last ones."""

    __slots__ = ("_weight", "count", "value")

    def __init__(self, weight: float) -> None:
        """``weight``: of a new value, once it is larger than its share of all."""
        self._weight = weight
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(self._weight, 1 / self.count)
