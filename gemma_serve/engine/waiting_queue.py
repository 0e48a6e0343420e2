"""Whose turn it is to start."""

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection

from gemma_serve.engine.sequence import Sequence, turn_of


class WaitingQueue:
    """Sequences that are not computed now: first the preempted ones, then one user after another.

    Of one user, the smallest priority is served first and, among equals, who came first. So nobody
    gets ahead of another user. A user whose sequence was taken goes to the end.
    """

    def __init__(self) -> None:
        self._preempted: list[Sequence] = []  # by turn
        self._of_user: OrderedDict[str | None, list[Sequence]] = OrderedDict()
        self._num_sequences = 0

    def __len__(self) -> int:
        return self._num_sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence among its user's others."""
        insort(self._of_user.setdefault(sequence.user, []), sequence, key=_rank)
        self._num_sequences += 1

    def add_preempted(self, sequence: Sequence) -> None:
        """Queue a sequence that was started before, among its like by turn."""
        insort(self._preempted, sequence, key=turn_of)
        self._num_sequences += 1

    def next(self, *, but_not: Collection[Sequence] = ()) -> Sequence | None:
        """The sequence whose turn it is, but neither one of ``but_not`` nor who stands behind it in
        the same line."""
        lines = (self._preempted, *self._of_user.values())
        heads = (line[0] for line in lines if line)
        return next((head for head in heads if head not in but_not), None)

    def take(self, sequence: Sequence) -> None:
        """Remove one that is started. A new one uses up its user's turn."""
        is_new = sequence not in self._preempted
        self.discard(sequence)
        if is_new and sequence.user in self._of_user:
            self._of_user.move_to_end(sequence.user)

    def discard(self, sequence: Sequence) -> None:
        """Remove one that waits."""
        self._num_sequences -= 1
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        line = self._of_user[sequence.user]
        line.remove(sequence)
        if not line:
            del self._of_user[sequence.user]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival
