"""Names for what stands in the blocks of a sequence."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Self

_DIGEST_BYTES: Final = 32
"""Whoever finds two prompts of equal digests reads one with the other's keys and values."""


@dataclass(frozen=True, slots=True)
class ImageContent:
    """An image that fills the positions ``[start, end)``; ``digest`` stands for its pixels."""

    start: int
    end: int
    digest: bytes


class BlockChain:
    """One digest for each full block, which covers all that its keys and values depend on.

    These are the block's token ids, the digest before it and, at the root, the tenant's salt; and
    any image that begins in the block, as a whole: its tokens see each other in both directions, so
    those in this block depend on those in the next.
    """

    __slots__ = ("_block_size", "_images", "_root", "digests")

    def __init__(
        self, *, block_size: int, images: Sequence[ImageContent] = (), salt: str | None = None
    ) -> None:
        """``salt``: chains of different salts share nothing."""
        self.digests: list[bytes] = []
        self._block_size = block_size
        self._images = tuple(images)
        self._root = _digest(b"" if salt is None else b"salt:" + salt.encode())

    def copy(self) -> Self:
        """A chain that goes on by itself, for another sequence of the same prompt."""
        twin = type(self)(block_size=self._block_size, images=self._images)
        twin._root = self._root
        twin.digests = self.digests.copy()
        return twin

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Name every block that the first ``num_tokens`` of ``token_ids`` fill."""
        num_named, num_full = len(self.digests), num_tokens // self._block_size
        if num_full <= num_named:
            return
        start = num_named * self._block_size
        packed = memoryview(array("q", token_ids[start : num_full * self._block_size])).cast("B")
        num_bytes = len(packed) // (num_full - num_named)
        previous = self.digests[-1] if self.digests else self._root
        for index in range(num_named, num_full):
            offset = (index - num_named) * num_bytes
            content = packed[offset : offset + num_bytes]
            previous = _digest(previous, content, *self._image_digests(index))
            self.digests.append(previous)

    def last_whole_end(self, num_blocks: int) -> int:
        """The most leading blocks, up to ``num_blocks``, that end inside no image."""
        position = num_blocks * self._block_size
        for image in reversed(self._images):
            if image.start < position < image.end:
                position = image.start // self._block_size * self._block_size
        return position // self._block_size

    def _image_digests(self, index: int) -> list[bytes]:
        """Those of the images that begin in block ``index``, with their places."""
        start, end = index * self._block_size, (index + 1) * self._block_size
        return [
            b"%d:%d:" % (image.start - start, image.end - start) + image.digest
            for image in self._images
            if start <= image.start < end
        ]


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
