"""What one sequence's sampling remembers from token to token."""

import math
import secrets
from array import array
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Self

from gemma_serve.engine.constraint import TokenConstraint
from gemma_serve.engine.restrictions import Restrictions
from gemma_serve.generation import SamplingParams

_BAN_BIAS = -100.0
"""OpenAI's ``logit_bias`` value for "never"; added as a number it would only be unlikely."""


@dataclass(slots=True)
class LogitAdjustments:
    """The tokens whose logits a sequence's penalties and bias change: parallel arrays, one entry
    per distinct token, so that a step copies memory and touches no other logit.
    """

    token_ids: "array[int]" = field(default_factory=lambda: array("q"))
    is_in_text: "array[int]" = field(default_factory=lambda: array("q"))
    """1 for a token of the prompt or the completion: the repetition penalty applies."""
    counts: "array[int]" = field(default_factory=lambda: array("q"))
    """Occurrences in the completion."""
    biases: "array[float]" = field(default_factory=lambda: array("d"))
    _positions: dict[int, int] = field(default_factory=dict)

    def add_bias(self, token_id: int, bias: float) -> None:
        self.biases[self._position(token_id)] += -math.inf if bias <= _BAN_BIAS else bias

    def add_prompt_token(self, token_id: int) -> None:
        self.is_in_text[self._position(token_id)] = 1

    def add_completion_token(self, token_id: int) -> None:
        position = self._position(token_id)
        self.is_in_text[position] = 1
        self.counts[position] += 1

    def copy(self) -> "LogitAdjustments":
        return LogitAdjustments(
            self.token_ids[:],
            self.is_in_text[:],
            self.counts[:],
            self.biases[:],
            {**self._positions},
        )

    def _position(self, token_id: int) -> int:
        position = self._positions.setdefault(token_id, len(self.token_ids))
        if position == len(self.token_ids):
            self.token_ids.append(token_id)
            self.is_in_text.append(0)
            self.counts.append(0)
            self.biases.append(0.0)
        return position


class SamplingState:
    """How one sequence samples, and what of its text that depends on.

    Owned by the sequence; ``Sampler`` only reads it.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        seed: int,
        prompt_token_ids: Sequence[int],
        constraint: TokenConstraint | None = None,
        ending_token_ids: Collection[int] = (),
    ) -> None:
        """``ending_token_ids``: those that would end the sequence."""
        self.restrictions = Restrictions.of(sampling, ending_token_ids)
        """``None``: the client allows every token."""
        self.sampling = sampling
        self.constraint = constraint
        """``None``: any text will do."""
        self.num_completion_tokens = 0
        self._seed = seed
        self._has_penalties = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        self.adjustments = (
            LogitAdjustments() if self._has_penalties or sampling.logit_bias else None
        )
        """``None``: nothing but the model decides the logits."""
        if self.adjustments is not None:
            for token_id, bias in sampling.logit_bias:
                self.adjustments.add_bias(token_id, bias)
            if sampling.repetition_penalty != 1.0:
                for token_id in set(prompt_token_ids):
                    self.adjustments.add_prompt_token(token_id)

    def append(self, token_id: int) -> None:
        """``token_id`` is the sequence's next completion token."""
        self.num_completion_tokens += 1
        if self.constraint is not None:
            self.constraint.accept(token_id)
        if self.restrictions is not None:
            self.restrictions.append(token_id)
        if self.adjustments is not None and self._has_penalties:
            self.adjustments.add_completion_token(token_id)

    def ahead(self, token_ids: Iterable[int]) -> list[Self]:
        """This state, and what it would be after each of ``token_ids``: to be read only."""
        states = [self]
        for token_id in token_ids:
            state = states[-1]._fork()
            state.append(token_id)
            states.append(state)
        return states

    def unadjusted(self, num_ahead: int) -> "SamplingState":
        """The same temperature, limits and random numbers, ``num_ahead`` tokens later; without
        penalties, bans, constraints and logprobs.

        With it another model guesses what will be sampled: where both find the same tokens about
        as probable, the same number mostly chooses the same token.
        """
        sampling = self.sampling
        state = SamplingState(
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
            ),
            seed=self._seed,
            prompt_token_ids=(),
        )
        state.num_completion_tokens = self.num_completion_tokens + num_ahead
        return state

    def _fork(self) -> Self:
        twin = copy(self)
        twin.restrictions = copy(self.restrictions)
        if self.constraint is not None:
            twin.constraint = self.constraint.fork()
        if self.adjustments is not None and self._has_penalties:
            twin.adjustments = self.adjustments.copy()
        return twin

    @property
    def is_over(self) -> bool:
        """Whether the constraint's text is complete."""
        return self.constraint is not None and self.constraint.is_over

    def uniform(self) -> float:
        """The number in [0, 1) that chooses the next token.

        A hash of the seed and the number of tokens so far: the same on every platform, next to any
        other sequences, and after the sequence was preempted and computed again.
        """
        return (_hash64(self._seed, self.num_completion_tokens) >> 11) * 2.0**-53

    @staticmethod
    def derive_seed(seed: int | None, index: int) -> int:
        """The seed of a request's sequence ``index``; ``seed=None`` draws a fresh one."""
        return secrets.randbits(64) if seed is None else _hash64(seed, index)


def _hash64(key: int, counter: int) -> int:
    digest = blake2b(b"%d:%d" % (key, counter), digest_size=8).digest()
    return int.from_bytes(digest, "little")
