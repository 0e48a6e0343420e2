"""The engine's border to what guesses how texts go on."""

from collections.abc import Mapping
from typing import Protocol

from gemma_serve.engine.sequence import Sequence


class Drafter(Protocol):
    """Guesses the next tokens of sequences. Used by the engine thread alone."""

    def hit_rates(self, sequence: Sequence) -> tuple[float, float]:
        """The chances of a first guess, and of each one after hits only.

        Asked in every step in which the sequence may be drafted; 0 where there is nothing to guess.
        """

    def guess(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """The next tokens of sequences whose hit rates were just asked, at most so many of each.

        Sequences without a guess may be left out.
        """

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended or lost its place; it may be unknown."""
