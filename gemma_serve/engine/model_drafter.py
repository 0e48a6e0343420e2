"""Guesses with a smaller model of the same vocabulary (Leviathan et al. 2023).

The smaller model has a cache of its own, and nothing but the tokens keeps it in step with the
served model's: before it guesses, it computes whatever a sequence has become since it last did.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.model_runner import ModelRunner, run_step
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.engine.sequence import Sequence

_FIRST_HIT_RATE: Final = 0.6
"""Worth a try, until the models show how well they agree."""

_RATE_STEP: Final = 1 / 16
"""What one guess weighs."""

_FORGETTING: Final = 0.001
"""By every step, so that guesses that did not pay are tried again some time."""

_MAX_TAIL: Final = 16
"""Tokens of a sequence that are computed in the same step as guesses after them. After more the
guesses wait for the next step: with a prompt before them they would seem dearer than they are."""


@dataclass(slots=True)
class _HitRate:
    """How often guesses came true lately."""

    value: float = _FIRST_HIT_RATE

    def observe(self, is_hit: bool) -> None:
        self.value += (is_hit - self.value) * _RATE_STEP

    def fade(self) -> None:
        self.value += (_FIRST_HIT_RATE - self.value) * _FORGETTING


@dataclass(slots=True, eq=False)
class _Follower:
    """One sequence as the smaller model has it."""

    leader: Sequence
    """What the served model has made of it."""
    own: Sequence
    """The same tokens with guesses behind them, and blocks of the smaller model's cache."""
    hit_rate: _HitRate
    guesses: list[int] = field(default_factory=list)

    def follow(self, token_ids: Iterable[int]) -> list[bool]:
        """Go on with ``token_ids``, which came in the places of the guesses and after them.

        Returns which guesses came true, up to the first that did not. What was computed of that one
        and those after it will be written over.
        """
        num_known = len(self.own.token_ids) - len(self.guesses)
        self.own.token_ids[num_known:] = token_ids
        hits: list[bool] = []
        for guess, token_id in zip(self.guesses, self.own.token_ids[num_known:], strict=False):
            hits.append(guess == token_id)
            if not hits[-1]:
                break
        # The last token is computed in any case: what follows it is wanted.
        num_valid = min(num_known + sum(hits), len(self.own.token_ids) - 1)
        self.own.num_computed_tokens = min(self.own.num_computed_tokens, num_valid)
        self.guesses.clear()
        return hits

    def add_guess(self, token_id: int) -> None:
        self.guesses.append(token_id)
        self.own.token_ids.append(token_id)

    @property
    def expects_end(self) -> bool:
        """Whether the last guess would end the sequence, so that none is of use after it."""
        return self.guesses[-1] in self.leader.stop_token_ids


class ModelDrafter:
    """A ``Drafter`` that asks a smaller model, token by token, all sequences at once.

    It samples by the sequence's own temperature, limits and random numbers. Images it cannot see:
    their sequences are not drafted.
    """

    def __init__(
        self,
        runner: ModelRunner,
        block_manager: BlockManager,
        *,
        vocab_size: int,
        max_model_len: int,
        prefill_chunk_size: int,
    ) -> None:
        """All of the smaller model. ``prefill_chunk_size``: known tokens computed per step."""
        self._runner = runner
        self._block_manager = block_manager
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._prefill_chunk_size = prefill_chunk_size
        self._followers: dict[Sequence, _Follower] = {}
        self._arrivals = count()
        self._hit_rate = _HitRate()
        """Over all sequences: what a new one is expected to have."""

    def hit_rates(self, sequence: Sequence) -> tuple[float, float]:
        """As ``Drafter.hit_rates``; learned from guesses alone, and by what others had at first."""
        if sequence.prompt.images or len(sequence.token_ids) >= self._max_model_len:
            return 0.0, 0.0
        follower = self._followers.get(sequence)
        if follower is None:
            self._hit_rate.fade()
            return self._hit_rate.value, self._hit_rate.value
        follower.hit_rate.fade()
        num_known = len(follower.own.token_ids) - len(follower.guesses)
        for is_hit in follower.follow(self._readable(sequence.token_ids[num_known:])):
            follower.hit_rate.observe(is_hit)
            self._hit_rate.observe(is_hit)
        return follower.hit_rate.value, follower.hit_rate.value

    def guess(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """As ``Drafter.guess``. Those of whom much is to be computed first get theirs later."""
        self._begin_one(counts)
        counts = {s: min(n, self._max_model_len - len(s.token_ids)) for s, n in counts.items()}
        followers = guessing = self._compute_known(counts)
        while guessing := [
            f for f in guessing if len(f.guesses) < counts[f.leader] and not f.expects_end
        ]:
            self._compute({follower: len(follower.own.token_ids) for follower in guessing})
        return {follower.leader: follower.guesses.copy() for follower in followers}

    def forget(self, sequence: Sequence) -> None:
        """As ``Drafter.forget``. Its blocks keep what they hold for those who begin alike."""
        if (follower := self._followers.pop(sequence, None)) is not None:
            self._block_manager.free(follower.own.block_table)

    def _begin_one(self, sequences: Iterable[Sequence]) -> None:
        """Follow one more sequence, if there is room for it.

        But one in each step: siblings then find what the first of them computed.
        """
        for sequence in sequences:
            if sequence not in self._followers and self._has_room_for(sequence):
                self._followers[sequence] = self._begin(sequence)
                return

    def _has_room_for(self, sequence: Sequence) -> bool:
        num_blocks = self._block_manager.blocks_for(
            len(sequence.token_ids), chunk_size=self._prefill_chunk_size
        )
        return num_blocks <= self._block_manager.num_free_blocks

    def _begin(self, sequence: Sequence) -> _Follower:
        chain = sequence.block_table.chain
        table = self._block_manager.new_table(chain and chain.copy())
        prefix = self._block_manager.find_prefix(table, len(sequence.token_ids) - 1)
        self._block_manager.take_prefix(table, prefix)
        own = replace(
            sequence,
            block_table=table,
            token_ids=self._readable(sequence.token_ids),
            num_computed_tokens=prefix.num_blocks * self._block_manager.block_size,
            # A sequence that comes back has another table, and runners tell tables by this.
            arrival=next(self._arrivals),
            prompt_scores=None,
        )
        return _Follower(sequence, own, replace(self._hit_rate))

    def _readable(self, token_ids: Iterable[int]) -> list[int]:
        """With another token for those that only a larger vocabulary has."""
        return [token_id if token_id < self._vocab_size else 0 for token_id in token_ids]

    def _compute_known(self, counts: Mapping[Sequence, int]) -> list[_Follower]:
        """Compute what the sequences have become. Returns those that have a first guess by that.

        Those with little to compute go first, so that no long prompt keeps them waiting.
        """
        ends: dict[_Follower, int] = {}
        token_budget = self._prefill_chunk_size
        followers = [f for s in counts if (f := self._followers.get(s)) is not None]
        for follower in sorted(followers, key=lambda f: f.own.num_uncomputed_tokens):
            own = follower.own
            end = own.chunk_end(token_budget)
            if own.num_uncomputed_tokens > _MAX_TAIL:
                end = min(end, len(own.token_ids) - 1)
            num_ahead = counts[follower.leader] - 1  # the last guess is never computed
            num_tokens = end + num_ahead if end == len(own.token_ids) else end
            if end > own.num_computed_tokens and self._block_manager.allocate(
                own.block_table, num_tokens
            ):
                token_budget -= end - own.num_computed_tokens
                ends[follower] = end
        if not ends:
            return []
        guessing = self._compute(ends)
        for follower, end in ends.items():
            # Not the guesses, as blocks are named for good by what stands in them; nor the last
            # token, which is computed again if the served model's step fails.
            self._block_manager.mark_computed(
                follower.own.block_table, follower.own.token_ids, end - 1
            )
        return guessing

    def _compute(self, ends: Mapping[_Follower, int]) -> list[_Follower]:
        """Compute tokens up to an end of each. Returns those that have one more guess by that."""
        batch = ScheduledBatch(tuple(_scheduled(f.own, end) for f, end in ends.items()))
        guessing = [f for f, end in ends.items() if end == len(f.own.token_ids)]
        for follower in guessing:
            state = follower.leader.sampling_state.unadjusted(len(follower.guesses))
            follower.own.sampling_state = state
        sampled = run_step(self._runner, batch)
        for follower, end in ends.items():
            follower.own.num_computed_tokens = end
        for follower, token in zip(guessing, sampled, strict=True):
            assert token.token_id is not None  # no constraint rules tokens out
            follower.add_guess(token.token_id)
        return guessing


def _scheduled(own: Sequence, end: int) -> ScheduledSequence:
    return ScheduledSequence(own, own.num_computed_tokens, end, samples=end == len(own.token_ids))
