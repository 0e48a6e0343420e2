"""Who is computed in the next step, and how much of it."""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.sequence import ImageSpan, Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The tokens ``[start, end)`` of one sequence."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    """Whether the step yields the next token: it computes the last one known."""

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids[self.start : self.end]

    @property
    def images(self) -> list[ImageSpan]:
        """The images inside ``[start, end)``; none is cut."""
        return [
            i for i in self.sequence.prompt.images if self.start <= i.start and i.end <= self.end
        ]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Decoding sequences come first."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def sampling(self) -> list[ScheduledSequence]:
        """Those that get a token, in the order of the step's logits."""
        return [s for s in self.scheduled if s.samples]


class Scheduler:
    """Continuous batching: decode first, then chunks of prompts, first come first served.

    When blocks run out, the newest sequence is *preempted*: it loses its blocks, waits, and is
    computed again from its tokens. An older one never yields to a newer one, and the pool holds at
    least one sequence of full length, so the oldest always gets on.
    Torch-free; used by the engine thread alone.
    """

    def __init__(
        self, *, block_manager: BlockManager, max_num_seqs: int, prefill_chunk_size: int
    ) -> None:
        self._block_manager = block_manager
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk_size = prefill_chunk_size
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by arrival

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        self._waiting.append(sequence)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget finished, failed or aborted sequences and free their blocks."""
        for sequence in sequences:
            if sequence in self._running:
                self._running.remove(sequence)
            else:
                self._waiting.remove(sequence)
            self._block_manager.free(sequence.block_table)

    def schedule(self) -> ScheduledBatch | None:
        """The next step, with its blocks allocated; ``None`` if nothing can be done."""
        scheduled: dict[int, ScheduledSequence] = {}  # by arrival
        self._schedule_decodes(scheduled)
        num_prefill_tokens = self._schedule_prefills(scheduled)
        self._admit(scheduled, token_budget=self._prefill_chunk_size - num_prefill_tokens)
        return ScheduledBatch(tuple(scheduled.values())) if scheduled else None

    def mark_computed(self, batch: ScheduledBatch) -> None:
        """Record that the step's keys and values are in the cache."""
        for scheduled in batch.scheduled:
            sequence = scheduled.sequence
            sequence.num_computed_tokens = scheduled.end
            self._block_manager.release_out_of_window(sequence.block_table, scheduled.end)

    def _schedule_decodes(self, scheduled: dict[int, ScheduledSequence]) -> None:
        for sequence in tuple(self._running):
            if sequence.num_uncomputed_tokens == 1:
                self._schedule_chunk(sequence, len(sequence.token_ids), scheduled)

    def _schedule_prefills(self, scheduled: dict[int, ScheduledSequence]) -> int:
        """Go on with prompts under way. Returns the number of tokens scheduled."""
        token_budget = self._prefill_chunk_size
        for sequence in tuple(self._running):
            if sequence.num_uncomputed_tokens > 1:
                end = sequence.chunk_end(token_budget)
                token_budget -= self._schedule_chunk(sequence, end, scheduled)
        return self._prefill_chunk_size - token_budget

    def _admit(self, scheduled: dict[int, ScheduledSequence], *, token_budget: int) -> None:
        """Start waiting sequences, in order, while there are places, tokens and blocks."""
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if sequence.chunk_end(token_budget) == 0 or not self._has_room_for(sequence):
                return
            self._waiting.popleft()
            insort(self._running, sequence, key=lambda s: s.arrival)
            end = sequence.chunk_end(token_budget)
            token_budget -= self._schedule_chunk(sequence, end, scheduled)

    def _has_room_for(self, sequence: Sequence) -> bool:
        """Whether its whole prompt fits beside what running prompts still have to take."""
        return (
            sum(self._num_blocks_to_come(s) for s in (*self._running, sequence))
            <= self._block_manager.num_free_blocks
        )

    def _num_blocks_to_come(self, sequence: Sequence) -> int:
        num_blocks = self._block_manager.blocks_for(
            len(sequence.token_ids), chunk_size=self._prefill_chunk_size
        )
        return max(0, num_blocks - self._block_manager.num_held(sequence.block_table))

    def _schedule_chunk(
        self, sequence: Sequence, end: int, scheduled: dict[int, ScheduledSequence]
    ) -> int:
        """Schedule up to ``end`` if blocks can be had. Returns the number of tokens scheduled."""
        start = sequence.num_computed_tokens
        if end == start or not self._make_room(sequence, end, scheduled):
            return 0
        samples = end == len(sequence.token_ids)
        scheduled[sequence.arrival] = ScheduledSequence(sequence, start, end, samples)
        return end - start

    def _make_room(
        self, sequence: Sequence, num_tokens: int, scheduled: dict[int, ScheduledSequence]
    ) -> bool:
        """Allocate, preempting newer sequences that this step does not compute."""
        if sequence not in self._running:  # preempted a moment ago
            return False
        while not self._block_manager.allocate(sequence.block_table, num_tokens):
            newest = self._running[-1]
            if newest is sequence or newest.arrival in scheduled:
                return False
            self._preempt(newest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._block_manager.free(sequence.block_table)
        sequence.num_computed_tokens = 0
        self._waiting.appendleft(sequence)
