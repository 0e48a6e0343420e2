"""Guesses how a sequence goes on from what stands in it already.

Answers repeat their prompts: code that is edited, text that is summarised, records that are copied
(Saxena 2023, "Prompt Lookup Decoding"). Where the last few tokens stood before, what followed them
then is likely to follow again.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Final

from gemma_serve.engine.sequence import Sequence

NGRAM: Final = 3
"""Tokens that must have stood together before. Two meet by chance in any prose; four miss the first
tokens of what is copied."""

_MAX_INDEXED_PER_STEP: Final = 2048
"""Tokens of a long prompt that one step takes in: half a millisecond."""

_FIRST_HIT_RATE: Final = 0.3
_NEXT_HIT_RATE: Final = 0.8
"""As in prose, until a sequence shows what it is."""

_RATE_STEP: Final = 1 / 16
"""What one guess weighs: a passage of some fifty tokens makes a new opinion."""


class LookupDrafter:
    """A ``Drafter`` that expects every text to repeat itself."""

    def __init__(self) -> None:
        self._lookups: dict[Sequence, PromptLookup] = {}

    def hit_rates(self, sequence: Sequence) -> tuple[float, float]:
        """As ``Drafter.hit_rates``."""
        lookup = self._lookups.get(sequence)
        if lookup is None:
            lookup = self._lookups[sequence] = PromptLookup(
                sequence.token_ids, num_prompt_tokens=len(sequence.prompt.token_ids)
            )
        lookup.catch_up()
        return lookup.hit_rates()

    def guess(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """As ``Drafter.guess``."""
        return {
            sequence: self._lookups[sequence].guess(count) for sequence, count in counts.items()
        }

    def forget(self, sequence: Sequence) -> None:
        """As ``Drafter.forget``."""
        self._lookups.pop(sequence, None)


class PromptLookup:
    """One sequence's guesses, and how often they have come true.

    Every token is compared with the guess for its place, whether or not that was ever drafted: so
    the rate of hits is known without spending anything on it. Uses the sequence's own list of
    tokens, which only grows. A guess costs a few dictionary look-ups, however long the text is.
    """

    def __init__(self, token_ids: Seq[int], *, num_prompt_tokens: int) -> None:
        self._token_ids = token_ids
        self._num_to_index = num_prompt_tokens - 1  # no guess is wanted before the last one
        self._num_seen = 0
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram: the index of what followed last
        self._source: int | None = None  # index of the guess for the next token
        self._is_confirmed = False  # whether the guess before it was right
        self._first_hit_rate = _FIRST_HIT_RATE
        self._next_hit_rate = _NEXT_HIT_RATE

    def catch_up(self) -> None:
        """Take in what the sequence has become since the last call."""
        num_tokens = len(self._token_ids)
        if self._num_seen < self._num_to_index:
            end = min(self._num_seen + _MAX_INDEXED_PER_STEP, self._num_to_index)
            self._index(self._num_seen, end)
            self._num_seen = end
            if end < self._num_to_index:
                return
        for position in range(self._num_seen, num_tokens):
            self._take_in(position)
        self._num_seen = num_tokens

    def guess(self, count: int) -> list[int]:
        """The next tokens, at most ``count``; none without an earlier occurrence.

        A guess that reaches the end of the text goes on with itself: what has been repeated with a
        period is expected to be so again.
        """
        if self._source is None:
            return []
        source, period = self._source, self._num_seen - self._source
        return [self._token_ids[source + i % period] for i in range(count)]

    def hit_rates(self) -> tuple[float, float]:
        """The chances of the first guess, and of each one after hits only."""
        first = self._next_hit_rate if self._is_confirmed else self._first_hit_rate
        return (0.0 if self._source is None else first), self._next_hit_rate

    def _take_in(self, position: int) -> None:
        end = position + 1
        ngram = tuple(self._token_ids[max(0, end - NGRAM) : end])
        if self._source is not None and self._follow(self._token_ids[position]):
            self._source += 1
        else:
            self._source = self._followers.get(ngram)
        self._followers[ngram] = end

    def _follow(self, token_id: int) -> bool:
        """Whether the guess was right; remembers it."""
        assert self._source is not None
        is_hit = self._token_ids[self._source] == token_id
        if self._is_confirmed:
            self._next_hit_rate += (is_hit - self._next_hit_rate) * _RATE_STEP
        else:
            self._first_hit_rate += (is_hit - self._first_hit_rate) * _RATE_STEP
        self._is_confirmed = is_hit
        return is_hit

    def _index(self, start: int, end: int) -> None:
        """Remember the n-grams whose last tokens are ``[start, end)``."""
        start = max(start, NGRAM - 1)
        ids = self._token_ids
        columns = (ids[start - back : max(start, end) - back] for back in range(NGRAM - 1, -1, -1))
        ends = range(start + 1, max(start, end) + 1)
        self._followers.update(zip(zip(*columns, strict=True), ends, strict=True))
