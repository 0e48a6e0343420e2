"""Who is computed in the next step, and how much of it."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.prefill_budget import PrefillBudget
from gemma_serve.engine.prefix_cache import CachedPrefix
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.sequence import ImageSpan, Sequence, turn_of
from gemma_serve.engine.speculation import Speculation
from gemma_serve.engine.waiting_queue import WaitingQueue


@dataclass(slots=True)
class ScheduledSequence:
    """The tokens ``[start, end)`` of one sequence, the last of which may be drafts."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    """Whether the step yields the next token: it computes the last one, known or awaited."""
    drafts: tuple[int, ...] = ()
    """Guesses for the tokens after the last one known. The step also samples what follows each."""
    is_taken_back: bool = field(default=False, init=False)
    """Whether it is to be computed again, by another step."""
    _num_freed: int = field(init=False, repr=False)
    """Names the blocks that the step computes into."""

    def __post_init__(self) -> None:
        self._num_freed = self.sequence.block_table.num_freed

    @property
    def stands(self) -> bool:
        """Whether what the step brings still counts: the sequence has neither ended nor lost its
        blocks since, nor was this taken back."""
        return not self.is_taken_back and self.sequence.block_table.num_freed == self._num_freed

    @property
    def token_ids(self) -> list[int]:
        """Those that are known: all, or all but the last if it ``is_awaited``."""
        return [*self.sequence.token_ids[self.start : self.end], *self.drafts]

    @property
    def is_awaited(self) -> bool:
        """Whether the last token is not known yet: the step before samples it."""
        return self.end - len(self.drafts) > len(self.sequence.token_ids)

    @property
    def num_sampled(self) -> int:
        """How many tokens the step samples: the next one, and one after each draft."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def decodes(self) -> bool:
        """Whether but one token is computed that is no guess."""
        return self.end - self.start - len(self.drafts) == 1

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

    @property
    def sampling_states(self) -> list[SamplingState]:
        """How each token is sampled: ``num_sampled`` for each of ``sampling``, in their order."""
        return [state for s in self.sampling for state in s.sequence.sampling_state.ahead(s.drafts)]

    @property
    def num_drafts(self) -> int:
        return sum(len(s.drafts) for s in self.scheduled)


class Scheduler:
    """Continuous batching: decode first, then chunks of prompts, in the order of their turns.

    Users take turns to start sequences; what is cached of a prompt is not computed again. When
    blocks run out, the sequence that was started last is *preempted*: it loses its blocks, waits in
    front of all others, and is computed again from its tokens. An earlier one never yields to a
    later one, and the pool holds at least one sequence of full length, so the first always gets on.
    Torch-free; used by the engine thread alone.
    """

    def __init__(
        self,
        *,
        block_manager: BlockManager,
        max_num_seqs: int,
        prefill_chunk_size: int,
        prefill_budget: PrefillBudget | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """``prefill_chunk_size``: prompt tokens in a step, at most. ``prefill_budget``: says when
        they must be fewer. ``speculation``: where drafts come from, if there are to be any."""
        self._block_manager = block_manager
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk_size = prefill_chunk_size
        self._prefill_budget = prefill_budget
        self._speculation = speculation
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # by turn
        self._turns = count()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence among its user's others."""
        self._waiting.add(sequence)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget finished, failed or aborted sequences and free their blocks."""
        for sequence in sequences:
            if sequence in self._running:
                self._running.remove(sequence)
            else:
                self._waiting.discard(sequence)
            self._release(sequence)

    def schedule(self) -> ScheduledBatch | None:
        """The next step, with its blocks allocated; ``None`` if nothing can be done.

        Steps are computed one after another, so the next one may be asked for while this one is
        under way: it goes on from where this one will have come.
        """
        scheduled: dict[int, ScheduledSequence] = {}  # by arrival
        self._schedule_decodes(scheduled)
        token_budget = self._token_budget(num_decoding=len(scheduled))
        token_budget -= self._schedule_prefills(scheduled, token_budget)
        self._admit(scheduled, token_budget)
        if self._speculation is not None:
            self._add_drafts(self._speculation, scheduled)
        for entry in scheduled.values():
            entry.sequence.num_computed_tokens = entry.end - len(entry.drafts)
            entry.sequence.num_awaited_tokens += entry.samples
        return ScheduledBatch(tuple(scheduled.values())) if scheduled else None

    def mark_computed(self, batch: ScheduledBatch) -> None:
        """Record that the step's keys and values are in the cache.

        Its sequences must have got their tokens by now. Whatever was computed for drafts that are
        none of them is left behind, to be written over.
        """
        for scheduled in batch.scheduled:
            if not scheduled.stands:
                continue
            sequence, num_computed = scheduled.sequence, scheduled.end
            sequence.num_awaited_tokens -= scheduled.samples
            if scheduled.drafts:
                num_computed = sequence.num_computed_tokens = len(sequence.token_ids) - 1
            self._block_manager.mark_computed(
                sequence.block_table, sequence.token_ids, num_computed
            )

    def observe(self, batch: ScheduledBatch, duration_s: float) -> None:
        """Learn from how long the step took."""
        if self._speculation is None and self._prefill_budget is None:
            return
        num_decoding = sum(s.decodes for s in batch.scheduled)
        num_prompt_tokens = sum(s.end - s.start for s in batch.scheduled if not s.decodes)
        if self._speculation is not None and num_prompt_tokens == 0:
            self._speculation.observe(
                num_decoding=num_decoding, num_drafts=batch.num_drafts, duration_s=duration_s
            )
        if self._prefill_budget is not None and batch.num_drafts == 0:
            self._prefill_budget.observe(
                num_decoding=num_decoding,
                num_prompt_tokens=num_prompt_tokens,
                duration_s=duration_s,
            )

    def take_back(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """Let them be computed again, as if they had not been scheduled: the latest step first."""
        for entry in scheduled:
            if entry.stands:
                entry.is_taken_back = True
                entry.sequence.num_computed_tokens = entry.start
                entry.sequence.num_awaited_tokens -= entry.samples

    def _schedule_decodes(self, scheduled: dict[int, ScheduledSequence]) -> None:
        for sequence in tuple(self._running):
            if sequence.num_uncomputed_tokens == 1 and not sequence.awaits_its_end:
                self._schedule_chunk(sequence, sequence.num_tokens, scheduled)

    def _token_budget(self, *, num_decoding: int) -> int:
        """Prompt tokens that the step may have."""
        if self._prefill_budget is None:
            return self._prefill_chunk_size
        num_places = self._max_num_seqs - len(self._running)
        num_begun = len(self._running) - num_decoding
        return self._prefill_budget.tokens(
            num_decoding=num_decoding, num_waiting=num_begun + min(num_places, len(self._waiting))
        )

    def _schedule_prefills(self, scheduled: dict[int, ScheduledSequence], token_budget: int) -> int:
        """Go on with prompts under way. Returns the number of tokens scheduled."""
        num_tokens = 0
        for sequence in tuple(self._running):
            if sequence.num_uncomputed_tokens > 1:
                end = sequence.chunk_end(token_budget - num_tokens)
                num_tokens += self._schedule_chunk(sequence, end, scheduled)
        return num_tokens

    def _admit(self, scheduled: dict[int, ScheduledSequence], token_budget: int) -> None:
        """Start waiting sequences in turn, while there are places, tokens and blocks."""
        if not self._waiting or token_budget == 0:
            return
        num_reserved = sum(map(self._num_blocks_to_come, self._running))
        expectant: list[Sequence] = []
        while len(self._running) < self._max_num_seqs and token_budget > 0:
            sequence = self._waiting.next(but_not=expectant)
            if sequence is None:
                return
            prefix = self._block_manager.find_prefix(
                sequence.block_table, sequence.num_reusable_tokens
            )
            if self._is_being_computed(sequence, prefix):
                expectant.append(sequence)
                continue
            start = prefix.num_blocks * self._block_manager.block_size
            end = sequence.chunk_end(token_budget, start=start)
            if end == start or not self._has_room_for(sequence, prefix, num_reserved):
                return
            self._start(sequence, prefix)
            token_budget -= self._schedule_chunk(sequence, end, scheduled)
            num_reserved += self._num_blocks_to_come(sequence)

    def _add_drafts(
        self, speculation: Speculation, scheduled: dict[int, ScheduledSequence]
    ) -> None:
        """Let sequences that decode guess, with rows and blocks that nobody else takes."""
        decoding = {s.sequence: s for s in scheduled.values() if s.decodes and s.samples}
        drafts = speculation.drafts(
            self._with_room_for(speculation.max_drafts, decoding.values()),
            num_decoding=len(decoding),
            num_free_rows=speculation.max_rows - sum(s.samples for s in scheduled.values()),
        )
        for sequence, token_ids in drafts.items():
            end = decoding[sequence].end + len(token_ids)
            has_room = self._block_manager.allocate(sequence.block_table, end)
            assert has_room
            scheduled[sequence.arrival] = replace(
                decoding[sequence], end=end, drafts=tuple(token_ids)
            )

    def _with_room_for(
        self, max_drafts: int, decoding: Iterable[ScheduledSequence]
    ) -> list[Sequence]:
        """Those that could be drafted with blocks that no running sequence needs.

        Known before anything is guessed: a guess may cost more than a look-up.
        """
        num_spare = self._block_manager.num_free_blocks
        num_spare -= sum(map(self._num_blocks_to_come, self._running))
        roomy = []
        for entry in decoding:
            table = entry.sequence.block_table
            num_missing = self._block_manager.num_missing(table, entry.end + max_drafts)
            if num_missing <= num_spare:
                num_spare -= num_missing
                roomy.append(entry.sequence)
        return roomy

    def _is_being_computed(self, sequence: Sequence, prefix: CachedPrefix) -> bool:
        """Whether a running prompt will compute what ``sequence`` needs after ``prefix``.

        Siblings of one request, and strangers who ask about the same text at once, wait for the
        first of them and take up its blocks.
        """
        chain = sequence.block_table.chain
        if chain is None:
            return False
        block_size = self._block_manager.block_size
        num_wanted = min(prefix.num_matched + 1, sequence.num_reusable_tokens // block_size)
        for other in self._running:
            first = max(prefix.num_blocks, other.block_table.num_full)
            other_chain = other.block_table.chain
            if first < num_wanted and other_chain is not None:
                wanted = chain.digests[first]
                if wanted in other_chain.digests[first : first + 1]:
                    return True
        return False

    def _has_room_for(self, sequence: Sequence, prefix: CachedPrefix, num_reserved: int) -> bool:
        """Whether its whole prompt fits beside what running prompts still have to take."""
        num_blocks = self._block_manager.blocks_for(
            len(sequence.token_ids), chunk_size=self._prefill_chunk_size
        )
        num_blocks -= self._block_manager.num_shared(prefix)
        return num_reserved + num_blocks <= self._block_manager.num_free_blocks

    def _num_blocks_to_come(self, sequence: Sequence) -> int:
        """Blocks that a running sequence has yet to take for the tokens it has now."""
        table, num_tokens = sequence.block_table, sequence.num_tokens
        if sequence.num_uncomputed_tokens <= 1:
            return self._block_manager.num_missing(table, num_tokens)
        num_blocks = self._block_manager.blocks_for(num_tokens, chunk_size=self._prefill_chunk_size)
        return max(0, num_blocks - self._block_manager.num_held(table))

    def _start(self, sequence: Sequence, prefix: CachedPrefix) -> None:
        self._waiting.take(sequence)
        self._block_manager.take_prefix(sequence.block_table, prefix)
        sequence.num_computed_tokens = prefix.num_blocks * self._block_manager.block_size
        if sequence.turn is None:
            sequence.turn = next(self._turns)
            sequence.num_cached_tokens = sequence.num_computed_tokens
        insort(self._running, sequence, key=turn_of)

    def _schedule_chunk(
        self, sequence: Sequence, end: int, scheduled: dict[int, ScheduledSequence]
    ) -> int:
        """Schedule up to ``end`` if blocks can be had. Returns the number of tokens scheduled."""
        start = sequence.num_computed_tokens
        if end == start or not self._make_room(sequence, end, scheduled):
            return 0
        samples = end == sequence.num_tokens
        scheduled[sequence.arrival] = ScheduledSequence(sequence, start, end, samples)
        return end - start

    def _make_room(
        self, sequence: Sequence, num_tokens: int, scheduled: dict[int, ScheduledSequence]
    ) -> bool:
        """Allocate, preempting later sequences that this step does not compute."""
        if sequence not in self._running:  # preempted a moment ago
            return False
        while not self._block_manager.allocate(sequence.block_table, num_tokens):
            last = self._running[-1]
            if last is sequence or last.arrival in scheduled:
                return False
            self._preempt(last)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = sequence.num_awaited_tokens = 0
        self._waiting.add_preempted(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back what it holds, here and where its drafts come from."""
        self._block_manager.free(sequence.block_table)
        if self._speculation is not None:
            self._speculation.forget(sequence)
