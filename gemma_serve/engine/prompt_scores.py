"""How probable the model found the tokens of a prompt."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of a prompt, as natural logarithms of the model's own probabilities."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """Id and logprob of the most probable tokens in its place, the most probable first."""


class PromptScores:
    """The scores of one sequence's prompt, filled by the model runner as it computes the prompt.

    Chunks come in order. A sequence that was preempted computes some tokens again; their scores are
    not taken twice.
    """

    def __init__(self, *, num_prompt_tokens: int, num_top: int) -> None:
        """``num_top``: how many of the most probable tokens are told."""
        self.num_top = num_top
        self.scores: list[TokenScore] = []
        """Entry ``i`` is that of prompt token ``i + 1``; nothing precedes the first token."""
        self._num_prompt_tokens = num_prompt_tokens

    def missing(self, start: int, end: int) -> range:
        """The tokens in ``[start, end)`` whose logits score a token that has no score yet."""
        return range(max(start, len(self.scores)), min(end, self._num_prompt_tokens - 1))

    def extend(self, scores: Iterable[TokenScore]) -> None:
        """Add those of ``missing``."""
        self.scores.extend(scores)
