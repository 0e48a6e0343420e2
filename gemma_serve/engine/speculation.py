"""Which sequences of a step are given drafts, and how many.

Drafted tokens are computed together with the last known one, and each place is sampled as if the
sequence had come there token by token. Drafts are kept as far as they are what was sampled, so no
text depends on them (Leviathan et al. 2023; for guesses of single tokens their rule is no better).
"""

from typing import Final

from gemma_serve.engine.draft_costs import DraftCosts
from gemma_serve.engine.sequence import Sequence

_MIN_GAIN: Final = 0.03
"""Of a sequence's speed: estimates are no better than that."""


class Speculation:
    """Drafts as many tokens as pay. Used by the engine thread alone."""

    def __init__(
        self, *, max_drafts: int, max_rows: int, vocab_size: int, costs: DraftCosts | None = None
    ) -> None:
        """``max_drafts``: per sequence and step. ``vocab_size``: ids from there on, such as those
        of images, are never sampled. ``costs``: how dear drafts are; by default they are measured.
        """
        self.max_rows = max_rows
        """The most tokens that one step samples, those after drafts included."""
        self._max_drafts = max_drafts
        self._vocab_size = vocab_size
        self._costs = costs or DraftCosts()

    def observe(self, *, num_decoding: int, num_drafts: int, duration_s: float) -> None:
        """Take in how long a step without prompts took."""
        self._costs.observe(num_decoding, num_drafts, duration_s)

    def drafts(self, sequence: Sequence, *, num_decoding: int, num_free_rows: int) -> list[int]:
        """What is likely to follow, if it pays to find out.

        ``num_decoding``: sequences that decode in this step, this one included.
        """
        lookup = sequence.prompt_lookup
        if lookup is None:
            return []
        lookup.catch_up()
        cost = self._costs.of(num_decoding)
        if cost is None:
            return []
        # One more token is sampled after the drafts.
        num_tokens_left = sequence.max_total_tokens - len(sequence.token_ids) - 1
        most = min(self._max_drafts, num_free_rows, num_tokens_left)
        count = best_count(lookup.hit_rates(), most, cost=cost, num_decoding=num_decoding)
        return self._possible(sequence, lookup.guess(count)) if count else []

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
