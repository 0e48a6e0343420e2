"""What the engine must know of a checkpoint's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemma_serve.generation import SampledLogprobs, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The texts of token ids, and what ends a turn."""

    token_bytes: Sequence[bytes]
    """UTF-8 bytes of every id; empty for control tokens."""
    eos_token_ids: frozenset[int]
    """The ids that end a turn."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a turn of this checkpoint, besides a request's own."""
    control_token_names: Mapping[int, bytes] = field(default_factory=dict)
    """UTF-8 names of the ids that are no text."""

    def spelled_out(
        self, chosen: tuple[int, float], top: Sequence[tuple[int, float]]
    ) -> SampledLogprobs:
        """With their texts: the ``(token_id, logprob)`` of a token, and of the most probable."""
        first, *rest = (
            TokenLogprob(token_id, logprob, self.token_bytes[token_id])
            for token_id, logprob in (chosen, *top)
        )
        return SampledLogprobs(first, tuple(rest))
