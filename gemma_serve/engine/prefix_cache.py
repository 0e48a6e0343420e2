"""Which blocks hold what, and which idle one is given up first."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_serve.engine.block_chain import BlockChain


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The leading blocks of a chain whose keys and values need not be computed."""

    num_blocks: int
    num_matched: int
    """Leading blocks that the groups without a window hold. Beyond ``num_blocks`` they are of no
    use: the windows before them are gone, or they end inside an image."""
    blocks: tuple[list[int], ...]
    """Per group, from the first block that a query after the prefix sees."""


NOTHING_CACHED = CachedPrefix(0, 0, ())


def first_visible_block(num_tokens: int, window: int | None, block_size: int) -> int:
    """The first block that the query at position ``num_tokens`` sees."""
    return 0 if window is None else max(0, num_tokens - window + 1) // block_size


def groups_of_window(windows: Sequence[int | None]) -> dict[int, list[int]]:
    """The groups with a window, by its length."""
    return {
        window: [group for group, w in enumerate(windows) if w == window]
        for window in windows
        if window is not None
    }


class PrefixCache:
    """Blocks by the digest of what they hold, in use or idle.

    A prefix can be taken up when every group without a window has all of its blocks, and every
    group with one has those that the next query sees.

    Idle blocks are given up in the order in which they became idle: first those that left a window
    at no particular place, then the lasting ones. Five of six layers have a window, so that one
    long prompt leaves many times more of the former than its whole chat needs to go on.
    """

    def __init__(self, *, block_size: int, windows: Sequence[int | None]) -> None:
        self._block_size = block_size
        self._windows = tuple(windows)
        self._full_groups = [g for g, window in enumerate(windows) if window is None]
        self._groups_of_window = groups_of_window(windows)
        self._nothing: list[int | None] = [None] * len(windows)
        self._blocks_of: dict[bytes, list[int | None]] = {}  # per group
        self._place_of: dict[int, tuple[bytes, int]] = {}  # digest and group
        self._passing: OrderedDict[int, None] = OrderedDict()
        self._lasting: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        return len(self._passing) + len(self._lasting)

    def __contains__(self, block: int) -> bool:
        return block in self._place_of

    def find(self, chain: BlockChain, max_blocks: int) -> CachedPrefix:
        """The longest prefix of at most ``max_blocks`` blocks that ends inside no image."""
        digests = chain.digests[:max_blocks]
        num_matched, gaps = self._match(digests)
        end = num_matched
        while end > 0:
            gap = self._last_gap_in_reach(end, gaps)
            usable_end = chain.last_whole_end(end if gap is None else gap)
            if usable_end == end:
                break
            end = usable_end
        return CachedPrefix(end, num_matched, tuple(self._held(digests[:end])))

    def add(self, digest: bytes, blocks: Sequence[int]) -> list[int]:
        """Record what ``blocks``, one of each group, hold. They are in use.

        Returns idle blocks of the same content that are needed no more: the newer ones stay cached
        longer. Those that are in use remain the known ones.
        """
        known = self._blocks_of.get(digest)
        if known is None:
            self._blocks_of[digest] = list(blocks)
            self._place_of.update((b, (digest, group)) for group, b in enumerate(blocks))
            return []
        replaced = []
        for group, (old, new) in enumerate(zip(known, blocks, strict=True)):
            if old is not None:
                if not self._is_idle(old):
                    continue
                self.revive(old)
                del self._place_of[old]
                replaced.append(old)
            known[group] = new
            self._place_of[new] = (digest, group)
        return replaced

    def retire(self, block: int, *, lasting: bool) -> None:
        """Nobody uses ``block`` any more. ``lasting``: a later request may well begin there."""
        (self._lasting if lasting else self._passing)[block] = None

    def revive(self, block: int) -> None:
        """An idle block is in use again."""
        (self._lasting if block in self._lasting else self._passing).pop(block)

    def evict(self) -> int:
        """Give up the idle block that is missed least."""
        block, _ = (self._passing or self._lasting).popitem(last=False)
        digest, group = self._place_of.pop(block)
        blocks = self._blocks_of[digest]
        blocks[group] = None
        if blocks == self._nothing:
            del self._blocks_of[digest]
        return block

    def _match(self, digests: Sequence[bytes]) -> tuple[int, dict[int, list[int]]]:
        """How many leading blocks the groups without a window hold, and, for each window, which of
        them its groups lack."""
        gaps: dict[int, list[int]] = {window: [] for window in self._groups_of_window}
        for index, digest in enumerate(digests):
            blocks = self._blocks_of.get(digest, self._nothing)
            if None not in blocks:
                continue
            if any(blocks[group] is None for group in self._full_groups):
                return index, gaps
            for window, groups in self._groups_of_window.items():
                if any(blocks[group] is None for group in groups):
                    gaps[window].append(index)
        return len(digests), gaps

    def _last_gap_in_reach(self, end: int, gaps: dict[int, list[int]]) -> int | None:
        """The last missing block that the query behind ``end`` blocks sees."""
        last = None
        for window, missing in gaps.items():
            before_end = bisect_left(missing, end)
            first = first_visible_block(end * self._block_size, window, self._block_size)
            if before_end and missing[before_end - 1] >= first:
                last = max(missing[before_end - 1], last or 0)
        return last

    def _held(self, digests: Sequence[bytes]) -> list[list[int]]:
        """Per group, the blocks that the query after ``digests`` sees."""
        num_tokens = len(digests) * self._block_size
        held = []
        for group, window in enumerate(self._windows):
            first = first_visible_block(num_tokens, window, self._block_size)
            blocks = [self._blocks_of[digest][group] for digest in digests[first:]]
            held.append([block for block in blocks if block is not None])
            assert len(held[-1]) == len(blocks)
        return held

    def _is_idle(self, block: int) -> bool:
        return block in self._passing or block in self._lasting
