"""Which sequences of a step are given drafts, how many, and by whom.

Drafted tokens are computed together with the last known one, and each place is sampled as if the
sequence had come there token by token. Drafts are kept as far as they are what was sampled, so no
text depends on them (Leviathan et al. 2023; for guesses of single tokens their rule is no better).
"""

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from gemma_serve.engine.draft_costs import DraftCosts
from gemma_serve.engine.drafter import Drafter
from gemma_serve.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_MIN_GAIN: Final = 0.03
"""Of a sequence's speed: estimates are no better than that."""


@dataclass(slots=True)
class _Source:
    """A drafter, what its drafts cost, and what it did for the step under way."""

    drafter: Drafter
    costs: DraftCosts
    has_drafted: bool = False
    duration_s: float = 0.0


class Speculation:
    """Drafts as many tokens as pay. Used by the engine thread alone."""

    def __init__(
        self,
        drafters: Iterable[Drafter],
        *,
        max_drafts: int,
        max_rows: int,
        vocab_size: int,
        make_costs: Callable[[], DraftCosts] = DraftCosts,
    ) -> None:
        """``drafters``: the first that has something to say about a sequence is heard.
        ``vocab_size``: ids from there on, such as those of images, are never sampled.
        ``make_costs``: how dear each drafter's drafts are; by default they are measured.
        """
        self.max_drafts = max_drafts
        """Per sequence and step."""
        self.max_rows = max_rows
        """The most tokens that one step samples, those after drafts included."""
        self._vocab_size = vocab_size
        self._sources = [_Source(drafter, make_costs()) for drafter in drafters]

    def observe(self, *, num_decoding: int, num_drafts: int, duration_s: float) -> None:
        """Take in how long a step without prompts took, the making of its drafts aside."""
        if num_drafts == 0:
            for source in self._sources:
                source.costs.observe(num_decoding, 0, duration_s)
            return
        drafting = [source for source in self._sources if source.has_drafted]
        if len(drafting) == 1:  # else nobody knows whose drafts cost what
            (source,) = drafting
            source.costs.observe(num_decoding, num_drafts, duration_s + source.duration_s)

    def drafts(
        self, sequences: Seq[Sequence], *, num_decoding: int, num_free_rows: int
    ) -> dict[Sequence, list[int]]:
        """What is likely to follow, where it pays to find out.

        ``num_decoding``: sequences that decode in this step, ``sequences`` among them.
        """
        drafts: dict[Sequence, list[int]] = {}
        for source in tuple(self._sources):
            counts: dict[Sequence, int] = {}
            for sequence in sequences:
                if sequence in drafts or not sequence.sampling_state.sampling.speculation:
                    continue
                if count := self._count(source, sequence, num_decoding, num_free_rows):
                    counts[sequence] = count
                    num_free_rows -= count
            found = self._guess(source, counts)
            num_free_rows += sum(counts.values()) - sum(map(len, found.values()))
            drafts |= found
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended or lost its place."""
        for source in self._sources:
            source.drafter.forget(sequence)

    def _count(
        self, source: _Source, sequence: Sequence, num_decoding: int, num_free_rows: int
    ) -> int:
        hit_rates = source.drafter.hit_rates(sequence)
        cost = source.costs.of(num_decoding)
        if cost is None:
            return 0
        # One more token is sampled after the drafts.
        num_tokens_left = sequence.max_total_tokens - len(sequence.token_ids) - 1
        most = min(self.max_drafts, num_free_rows, num_tokens_left)
        return best_count(hit_rates, most, cost=cost, num_decoding=num_decoding)

    def _guess(self, source: _Source, counts: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """The guesses that may turn out right, for each sequence that has any."""
        source.has_drafted = False
        if not counts:
            return {}
        started_at = perf_counter()
        try:
            guesses = source.drafter.guess(counts)
        except Exception:
            # The boundary to what no request needs: a guess must not cost anyone an answer.
            logger.exception("guessing failed; there will be no more guesses of this kind")
            self._sources.remove(source)
            return {}
        source.duration_s = perf_counter() - started_at
        possible = {
            sequence: kept
            for sequence, token_ids in guesses.items()
            if (kept := self._possible(sequence, token_ids))
        }
        source.has_drafted = bool(possible)
        return possible

    def _possible(self, sequence: Sequence, token_ids: list[int]) -> list[int]:
        """Those before the first that cannot be sampled, or would be the sequence's last."""
        for index, token_id in enumerate(token_ids):
            if token_id >= self._vocab_size or token_id in sequence.stop_token_ids:
                token_ids = token_ids[:index]
                break
        constraint = sequence.sampling_state.constraint
        if constraint is None or not token_ids:
            return token_ids
        return token_ids[: constraint.num_acceptable(token_ids)]


def best_count(hit_rates: tuple[float, float], most: int, *, cost: float, num_decoding: int) -> int:
    """How many drafts give a step the most tokens per second; 0 if none are worth it.

    ``hit_rates``: of the first draft, and of each further one. ``cost``: what a draft adds to the
    step's duration, as a share of it.
    """
    chance, further = hit_rates
    if chance == 0:
        return 0
    best, best_gain, num_hits = 0, 1 + _MIN_GAIN / num_decoding, 0.0
    for count in range(1, most + 1):
        num_hits += chance
        chance *= further
        gain = (1 + num_hits / num_decoding) / (1 + cost * count)
        if gain > best_gain:
            best, best_gain = count, gain
    return best
