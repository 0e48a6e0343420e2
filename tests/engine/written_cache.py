"""A cache that remembers, instead of keys and values, what they were computed from."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.engine.sequence import Sequence

Content = tuple[int, int, bytes]
"""Position, token id, and the image that the token is part of."""


class WrittenCache:
    """Stores and reads like attention does, and checks that each reader finds its own prefix."""

    def __init__(self, *, num_blocks: int, block_size: int, windows: Seq[int | None]) -> None:
        self._windows = windows
        self._block_size = block_size
        self._slots: list[dict[int, Content]] = [{} for _ in range(num_blocks)]

    def run(self, batch: ScheduledBatch, awaited: Mapping[int, int] | None = None) -> None:
        """Write the step's tokens in all groups, then let each of them read what it sees.

        ``awaited``: the tokens that are, by arrival.
        """
        for scheduled in batch.scheduled:
            self._write(scheduled, awaited or {})
        for scheduled in batch.scheduled:
            self._check(scheduled, awaited or {})

    def _write(self, scheduled: ScheduledSequence, awaited: Mapping[int, int]) -> None:
        for group in range(len(self._windows)):
            for position in range(scheduled.start, scheduled.end):
                block = self._slots[self._block(scheduled.sequence, group, position)]
                block[position % self._block_size] = content(scheduled, position, awaited)

    def _check(self, scheduled: ScheduledSequence, awaited: Mapping[int, int]) -> None:
        sequence = scheduled.sequence
        for group, window in enumerate(self._windows):
            first = 0 if window is None else max(0, scheduled.start - window + 1)
            for position in range(first, scheduled.end):
                block = self._slots[self._block(sequence, group, position)]
                written = block.get(position % self._block_size)
                assert written == content(scheduled, position, awaited)

    def _block(self, sequence: Sequence, group: int, position: int) -> int:
        entry = position // self._block_size
        assert entry >= sequence.block_table.num_released[group]
        return sequence.block_table.groups[group][entry]


def content(scheduled: ScheduledSequence, position: int, awaited: Mapping[int, int]) -> Content:
    sequence = scheduled.sequence
    views = [i.view for i in sequence.prompt.images if i.start <= position < i.end]
    num_known = len(sequence.token_ids)
    if position >= num_known and scheduled.is_awaited:
        return position, awaited[sequence.arrival], b""
    if position >= num_known:
        return position, scheduled.drafts[position - num_known], b""
    return position, sequence.token_ids[position], views[0] if views else b""
