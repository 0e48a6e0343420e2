"""Which blocks of the KV cache belong to whom.

Layers that look back equally far form *groups* (``gemma.kv_cache.CacheLayout``). A block holds the
keys and values of ``block_size`` tokens for one group, and all groups draw from one pool, so the
same memory serves many short chats or a few long ones. A group with a window gives its blocks back
as they leave the window.

A block that sequences with the same beginning share has several users. A block without a user is
free, but keeps what it holds until it is needed (``prefix_cache``).
"""

from collections.abc import Sequence

from gemma_serve.engine.block_chain import BlockChain
from gemma_serve.engine.prefix_cache import (
    NOTHING_CACHED,
    CachedPrefix,
    PrefixCache,
    first_visible_block,
    groups_of_window,
)


def max_blocks_held(
    num_tokens: int, *, chunk_size: int, block_size: int, windows: Sequence[int | None]
) -> int:
    """The most blocks that a sequence of ``num_tokens`` holds at once.

    ``chunk_size``: the most tokens that one step adds to it.
    """
    # A window is kept from the last full block on, for others to begin there, so the next query may
    # stand anywhere in the block after it.
    reach = [
        num_tokens
        if window is None
        else min(num_tokens, -(-window // block_size) * block_size + chunk_size + block_size)
        for window in windows
    ]
    return sum(-(-num_keys // block_size) for num_keys in reach)


class BlockTable:
    """The blocks of one sequence. Changed by ``BlockManager`` alone."""

    __slots__ = ("chain", "groups", "num_freed", "num_full", "num_released", "resume_points")

    def __init__(self, num_groups: int, chain: BlockChain | None) -> None:
        self.chain = chain
        """What the blocks hold; ``None``: they are shared with nobody and kept for nobody."""
        self.groups: list[list[int]] = [[] for _ in range(num_groups)]
        """Per group: entry ``i`` holds the tokens ``[i * block_size, (i + 1) * block_size)``."""
        self.num_released = [0] * num_groups
        """Per group: how many of the first entries are not there and must not be read."""
        self.num_full = 0
        """Leading blocks whose tokens are all computed."""
        self.num_freed = 0
        """How often all blocks were given back; in between, entries are only added."""
        self.resume_points: tuple[int, ...] = ()
        """Numbers of leading blocks behind which a later request is likely to part."""


class BlockManager:
    """Owns the pool of blocks.

    ``windows``: per group, how many tokens back a query sees, itself included; ``None`` for all.
    """

    def __init__(self, *, num_blocks: int, block_size: int, windows: Sequence[int | None]) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._windows = tuple(windows)
        self._groups_of_window = groups_of_window(windows)
        self._num_users = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # neither used nor cached
        self._cache = PrefixCache(block_size=block_size, windows=windows)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody uses, those with something cached included."""
        return len(self._empty) + self._cache.num_idle

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that still hold something."""
        return self._cache.num_idle

    def num_held(self, table: BlockTable) -> int:
        """Blocks that the table holds now, shared ones included."""
        return sum(map(len, table.groups)) - sum(table.num_released)

    def new_table(self, chain: BlockChain | None = None) -> BlockTable:
        """A table without blocks; with a ``chain``, its blocks are shared by their content."""
        return BlockTable(len(self._windows), chain)

    def blocks_for(self, num_tokens: int, *, chunk_size: int) -> int:
        """As ``max_blocks_held``."""
        return max_blocks_held(
            num_tokens, chunk_size=chunk_size, block_size=self.block_size, windows=self._windows
        )

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table lacks for the first ``num_tokens`` of its sequence."""
        num_entries = -(-num_tokens // self.block_size)
        return max(0, num_entries - len(table.groups[0])) * len(table.groups)

    def find_prefix(self, table: BlockTable, num_tokens: int) -> CachedPrefix:
        """What is cached of a sequence's first ``num_tokens``; good until blocks change hands."""
        if table.chain is None:
            return NOTHING_CACHED
        return self._cache.find(table.chain, num_tokens // self.block_size)

    def num_shared(self, prefix: CachedPrefix) -> int:
        """How many of its blocks are in use: taking them up costs no free one."""
        return sum(self._num_users[block] > 0 for blocks in prefix.blocks for block in blocks)

    def take_prefix(self, table: BlockTable, prefix: CachedPrefix) -> None:
        """Let an empty table begin with ``prefix``."""
        for group, blocks in enumerate(prefix.blocks):
            num_absent = prefix.num_blocks - len(blocks)
            # What stands in absent entries is never read.
            table.groups[group] = [0] * num_absent + blocks
            table.num_released[group] = num_absent
            for block in blocks:
                self._use(block)
        table.num_full = prefix.num_blocks
        if table.chain is not None:
            prompt_end = table.chain.last_whole_end(len(table.chain.digests))
            matched_end = table.chain.last_whole_end(prefix.num_matched)
            table.resume_points = (prompt_end, matched_end)

    def allocate(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for the first ``num_tokens`` of a sequence; changes nothing if it cannot."""
        num_missing = self.num_missing(table, num_tokens)
        if num_missing == 0:
            return True
        if num_missing > self.num_free_blocks:
            return False
        for blocks in table.groups:
            for _ in range(num_missing // len(table.groups)):
                blocks.append(self._take_free_block())
        return True

    def mark_computed(
        self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int
    ) -> None:
        """Let others use the blocks that are full by now, and give back what left the windows.

        ``token_ids``: the sequence's, whose first ``num_computed_tokens`` are in the cache.
        """
        num_full = num_computed_tokens // self.block_size
        if num_full == table.num_full:
            return
        if table.chain is not None:
            table.chain.extend(token_ids, num_computed_tokens)
            self._make_known(table, table.chain.digests[table.num_full : num_full])
        table.num_full = num_full
        self._release_out_of_windows(table)

    def free(self, table: BlockTable) -> None:
        """Give back everything; the table is empty afterwards, its chain goes on."""
        # The last block first: what is left of a chain must begin at its beginning.
        for index in range(len(table.groups[0]) - 1, min(table.num_released) - 1, -1):
            for blocks, num_released in zip(table.groups, table.num_released, strict=True):
                if index >= num_released:
                    self._release(blocks[index], lasting=True)
        for group, blocks in enumerate(table.groups):
            blocks.clear()
            table.num_released[group] = 0
        table.num_full = 0
        table.num_freed += 1

    def _make_known(self, table: BlockTable, digests: Sequence[bytes]) -> None:
        """``digests``: of the blocks that have become full."""
        for index, digest in enumerate(digests, table.num_full):
            self._empty += self._cache.add(digest, [blocks[index] for blocks in table.groups])

    def _release_out_of_windows(self, table: BlockTable) -> None:
        """Give back what neither this sequence sees any more, nor one that begins behind its last
        full block."""
        num_tokens = table.num_full * self.block_size
        for window, groups in self._groups_of_window.items():
            first = first_visible_block(num_tokens, window, self.block_size)
            for index in range(table.num_released[groups[0]], first):
                lasting = self._is_seen_from_resume_point(table, index, window)
                for group in groups:
                    self._release(table.groups[group][index], lasting=lasting)
                    table.num_released[group] = index + 1

    def _is_seen_from_resume_point(self, table: BlockTable, index: int, window: int | None) -> bool:
        # One block more: the same prompt once more is resumed before its last token.
        return any(
            first_visible_block((end - 1) * self.block_size, window, self.block_size) <= index < end
            for end in table.resume_points
        )

    def _use(self, block: int) -> None:
        if self._num_users[block] == 0:
            self._cache.revive(block)
        self._num_users[block] += 1

    def _take_free_block(self) -> int:
        block = self._empty.pop() if self._empty else self._cache.evict()
        self._num_users[block] = 1
        return block

    def _release(self, block: int, *, lasting: bool) -> None:
        self._num_users[block] -= 1
        if self._num_users[block] == 0:
            if block in self._cache:
                self._cache.retire(block, lasting=lasting)
            else:
                self._empty.append(block)
