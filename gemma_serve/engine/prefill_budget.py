"""How many prompt tokens a step may compute beside sequences that decode.

Whoever decodes waits for the whole step. A step without prompts is bound by reading the weights,
which a few hundred prompt tokens share; more of them make everybody wait. How many that is depends
on the model and the device, so it is measured.
"""

from typing import Final

from gemma_serve.engine.running_mean import RunningMean

_MIN_TOKENS: Final = 32
"""Fewer are hardly faster, and a prompt must get on."""

_MIN_PLAIN_STEPS: Final = 4
"""Of about as many sequences, until their duration is known: the first ones warm up."""

_PLAIN_WEIGHT: Final = 0.1
_COST_WEIGHT: Final = 0.3


class PrefillBudget:
    """Learns from the steps' durations what a prompt token costs beside others."""

    def __init__(self, *, chunk_size: int, max_slowdown: float, min_tokens: int = 0) -> None:
        """``chunk_size``: the most there ever are. ``max_slowdown``: how many times as long as a
        step without prompts one with prompts may take. ``min_tokens``: are always allowed.
        """
        self._chunk_size = chunk_size
        self._max_slowdown = max_slowdown
        self._min_tokens = min(max(min_tokens, _MIN_TOKENS), chunk_size)
        self._plain: dict[int, RunningMean] = {}
        """Seconds of steps without prompts, by the magnitude of how many sequences decode."""
        self._cost_s: float | None = None
        """What a prompt token adds to a step, where prompts add as much as they may."""

    def tokens(self, *, num_decoding: int, num_waiting: int) -> int:
        """How many the next step may have.

        ``num_waiting``: sequences whose prompts are not computed. Where they are more than those
        that decode, those wait longer, so that fewer wait in all.
        """
        plain_s = self._plain_s(num_decoding)
        if plain_s is None or self._cost_s is None:
            return self._chunk_size
        allowed_s = self._allowed_s(plain_s) * max(1.0, num_waiting / num_decoding)
        if allowed_s >= self._cost_s * self._chunk_size:
            return self._chunk_size
        return max(self._min_tokens, int(allowed_s / self._cost_s))

    def observe(self, *, num_decoding: int, num_prompt_tokens: int, duration_s: float) -> None:
        """Take in how long a step took."""
        if num_decoding == 0:
            return
        if num_prompt_tokens == 0:
            plain = self._plain.setdefault(num_decoding.bit_length(), RunningMean(_PLAIN_WEIGHT))
            plain.add(duration_s)
        elif num_prompt_tokens >= _MIN_TOKENS and (plain_s := self._plain_s(num_decoding)):
            allowed_s = self._allowed_s(plain_s)
            # The first tokens may cost nothing, so what a few cost does not tell of more: where
            # there is time left, as if the whole step took longer with each.
            cautious_s = allowed_s * duration_s / (plain_s + allowed_s)
            cost_s = max(duration_s - plain_s, cautious_s) / num_prompt_tokens
            known_s = cost_s if self._cost_s is None else self._cost_s
            self._cost_s = known_s + (cost_s - known_s) * _COST_WEIGHT

    def _allowed_s(self, plain_s: float) -> float:
        """What prompts may add to a step."""
        return plain_s * (self._max_slowdown - 1)

    def _plain_s(self, num_decoding: int) -> float | None:
        """Of a step with about as many sequences, or the nearest number that is known."""
        known = [size for size, mean in self._plain.items() if mean.count >= _MIN_PLAIN_STEPS]
        if not known or num_decoding == 0:
            return None
        return self._plain[min(known, key=lambda size: abs(size - num_decoding.bit_length()))].value
