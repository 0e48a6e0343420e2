"""Which blocks of the KV cache belong to whom.

Layers that look back equally far form *groups* (``gemma.kv_cache.CacheLayout``). A block holds the
keys and values of ``block_size`` tokens for one group, and all groups draw from one pool, so the
same memory serves many short chats or a few long ones. A group with a window gives its blocks back
as they leave the window.
"""

from collections.abc import Sequence


def max_blocks_held(
    num_tokens: int, *, chunk_size: int, block_size: int, windows: Sequence[int | None]
) -> int:
    """The most blocks that a sequence of ``num_tokens`` holds at once.

    ``chunk_size``: the most tokens that one step adds to it.
    """
    # A window may begin anywhere in a block, so it takes one more than its tokens fill.
    reach = [
        num_tokens if window is None else min(num_tokens, window + chunk_size + block_size)
        for window in windows
    ]
    return sum(-(-num_keys // block_size) for num_keys in reach)


class BlockTable:
    """The blocks of one sequence. Changed by ``BlockManager`` alone."""

    __slots__ = ("groups", "num_released")

    def __init__(self, num_groups: int) -> None:
        self.groups: list[list[int]] = [[] for _ in range(num_groups)]
        """Per group: entry ``i`` holds the tokens ``[i * block_size, (i + 1) * block_size)``."""
        self.num_released = [0] * num_groups
        """Per group: how many of the first entries were given back and must not be read."""


class BlockManager:
    """Owns the pool of free blocks.

    ``windows``: per group, how many tokens back a query sees, itself included; ``None`` for all.
    """

    def __init__(self, *, num_blocks: int, block_size: int, windows: Sequence[int | None]) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._windows = tuple(windows)
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_held(self, table: BlockTable) -> int:
        """Blocks that the table holds now."""
        return sum(map(len, table.groups)) - sum(table.num_released)

    def new_table(self) -> BlockTable:
        """A table without blocks."""
        return BlockTable(len(self._windows))

    def blocks_for(self, num_tokens: int, *, chunk_size: int) -> int:
        """As ``max_blocks_held``."""
        return max_blocks_held(
            num_tokens, chunk_size=chunk_size, block_size=self.block_size, windows=self._windows
        )

    def allocate(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for the first ``num_tokens`` of a sequence; changes nothing if it cannot."""
        num_entries = -(-num_tokens // self.block_size)
        if sum(max(0, num_entries - len(blocks)) for blocks in table.groups) > len(self._free):
            return False
        for blocks in table.groups:
            for _ in range(num_entries - len(blocks)):
                blocks.append(self._free.pop())
        return True

    def release_out_of_window(self, table: BlockTable, num_computed_tokens: int) -> None:
        """Give back what no query at ``num_computed_tokens`` or later can see."""
        for group, window in enumerate(self._windows):
            if window is None:
                continue
            first_visible = max(0, num_computed_tokens - window + 1)
            num_dead = min(first_visible // self.block_size, len(table.groups[group]))
            self._free.extend(table.groups[group][table.num_released[group] : num_dead])
            table.num_released[group] = max(table.num_released[group], num_dead)

    def free(self, table: BlockTable) -> None:
        """Give back everything; the table is empty afterwards."""
        for group, blocks in enumerate(table.groups):
            self._free.extend(blocks[table.num_released[group] :])
            blocks.clear()
            table.num_released[group] = 0
