"""What attention must know of a step, in plain numbers.

A step's tokens are packed: one row of the batch holds one *chunk* per sequence, one after another.
A chunk is cut into *segments*: text attends causally, and the tokens of one image attend to each
other in both directions, so they see every key up to their image's end. In layers with a window
a query at position ``p`` sees no key before ``p - window + 1``, in text and images alike
(``create_masks_for_vision_model`` in transformers).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens ``[start, end)`` of one sequence that share a masking rule."""

    row: int
    """Where ``start`` stands in the packed step."""
    start: int
    end: int
    causal: bool

    def first_key(self, window: int | None) -> int:
        """The first position that any of the queries sees."""
        return 0 if window is None else max(0, self.start - window + 1)

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.num_tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens ``[start, end)`` of one sequence in this step."""

    row: int
    start: int
    end: int
    images: tuple[tuple[int, int], ...]
    """``(start, end)`` of each image in the chunk; none is cut."""
    blocks: tuple[Sequence[int], ...]
    """Per cache group: the blocks of the sequence's tokens from position 0 on. Those behind the
    window may have new owners and are not read."""
    blocks_id: tuple[int, int]
    """Names the blocks: while it is the same, more may be added, and those there stay."""

    def segments(self) -> Iterator[Segment]:
        """The chunk's tokens, each in one segment, in order."""
        position = self.start
        for image_start, image_end in self.images:
            if position < image_start:
                yield self._segment(position, image_start, causal=True)
            yield self._segment(image_start, image_end, causal=False)
            position = image_end
        if position < self.end:
            yield self._segment(position, self.end, causal=True)

    def _segment(self, start: int, end: int, *, causal: bool) -> Segment:
        return Segment(self.row + start - self.start, start, end, causal)
