"""One generation in progress, and the prompt it started from."""

from dataclasses import dataclass, field
from hashlib import blake2b

from gemma_serve.engine.block_manager import BlockTable
from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.engine.prompt_scores import PromptScores
from gemma_serve.engine.sampling_state import SamplingState


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one view of an image stands in a prompt. Its tokens are computed in one step."""

    start: int
    """Index of the first soft token."""
    num_tokens: int
    view: bytes
    """As in ``messages.ImagePart``; the engine hands it through to the model runner."""
    digest: bytes = field(init=False, repr=False)
    """Names the view by its content. Made with the span, so off the engine thread: hashing the 2.4
    MB of a view of 896 pixels takes about 3 ms."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", blake2b(self.view, digest_size=32).digest())

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """A prompt ready for the model: token ids, and images in the order of their spans."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One of a request's ``n`` generations. Changed on the engine thread alone."""

    request_key: int
    """The engine's own number of the request; clients may repeat theirs."""
    index: int
    prompt: PromptInputs
    sampling_state: SamplingState
    detokenizer: Detokenizer
    stop_token_ids: frozenset[int]
    max_total_tokens: int
    """Prompt and completion together, at most."""
    block_table: BlockTable
    arrival: int
    """Smaller came earlier. No two sequences have the same."""
    token_ids: list[int]
    """Prompt and completion."""
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache, or will be after the steps under
    way."""
    num_awaited_tokens: int = 0
    """Tokens behind ``token_ids`` that the steps under way sample."""
    user: str | None = None
    """Whose turn it uses up; ``None`` is one user too."""
    priority: int = 0
    """Smaller goes first among those of its user that were not started."""
    turn: int | None = None
    """Smaller was started earlier, is served first and preempted last; ``None`` until then."""
    num_cached_tokens: int = 0
    """Prompt tokens that were in the cache when the sequence was started."""
    prompt_scores: PromptScores | None = None
    """If they are asked for and not yet handed out."""

    @property
    def num_reusable_tokens(self) -> int:
        """Leading tokens that the cache may hold already: the logits of none of them are needed."""
        if self.prompt_scores is not None:
            return len(self.prompt_scores.scores)
        return len(self.token_ids) - 1

    @property
    def num_tokens(self) -> int:
        """Known ones and awaited ones."""
        return len(self.token_ids) + self.num_awaited_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def awaits_its_end(self) -> bool:
        """Whether the tokens that it awaits are its last."""
        return self.num_awaited_tokens > 0 and self.num_tokens >= self.max_total_tokens

    def chunk_end(self, max_tokens: int, *, start: int | None = None) -> int:
        """Where a chunk of at most ``max_tokens`` tokens ends without cutting an image.

        ``start``: its first token; by default the first one that is not computed.
        """
        start = self.num_computed_tokens if start is None else start
        end = min(start + max_tokens, self.num_tokens)
        for image in self.prompt.images:
            if image.start < end < image.end:
                return image.start
        return end


def turn_of(sequence: Sequence) -> int:
    """The order of those that were started."""
    assert sequence.turn is not None
    return sequence.turn
