"""One generation in progress, and the prompt it started from."""

from dataclasses import dataclass

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
    """Smaller came earlier. Earlier sequences are served first and preempted last."""
    token_ids: list[int]
    """Prompt and completion."""
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache."""
    prompt_scores: PromptScores | None = None
    """If they are asked for and not yet handed out."""

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def chunk_end(self, max_tokens: int) -> int:
        """Where a chunk of at most ``max_tokens`` tokens ends without cutting an image."""
        end = min(self.num_computed_tokens + max_tokens, len(self.token_ids))
        for image in self.prompt.images:
            if image.start < end < image.end:
                return image.start
        return end
