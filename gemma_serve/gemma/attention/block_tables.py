"""Which block holds which of a sequence's tokens, kept where the attention kernels run.

A step would have to send tens of thousands of numbers if it sent whole tables: a chat of 128 k
tokens has 8,192 blocks in each group. So the tables stay on the device, each sequence has a *seat*
in them for as long as it is computed, and a step sends what was added since the last one.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import KVCache


@dataclass(slots=True)
class _Seat:
    index: int
    num_known: int = 0
    """Leading blocks, per group, that the device has been told of."""


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """What a step must tell the device before it attends."""

    seats: list[int]
    """Of each chunk's sequence."""
    places: "array[int]" = field(default_factory=lambda: array("q"))
    """Indices into the flattened tables, no two alike."""
    blocks: "array[int]" = field(default_factory=lambda: array("q"))
    """What comes there."""
    known_then: list[tuple[_Seat, int]] = field(default_factory=list)


class BlockTables:
    """One table per device of the cache. Changed by the thread that runs the model alone."""

    def __init__(self, cache: KVCache, *, num_seats: int, max_model_len: int) -> None:
        """``num_seats``: sequences in one step, at most."""
        self.block_size = cache.block_size
        self._shape = (
            len(cache.layout.windows),
            num_seats,
            -(-max_model_len // cache.block_size),
        )
        self._tables = {
            device: torch.zeros(self._shape, dtype=torch.int32, device=device)
            for device in dict.fromkeys(cache.layout.plane_devices)
        }
        self._seats: dict[tuple[int, int], _Seat] = {}
        self._free = list(range(num_seats - 1, -1, -1))

    @property
    def nbytes(self) -> int:
        """On one device."""
        num_groups, num_seats, width = self._shape
        return num_groups * num_seats * width * torch.int32.itemsize

    def on(self, device: torch.device) -> Tensor:
        """``[num_groups, num_seats, max_blocks]`` int32; what is not known yet is 0."""
        return self._tables[device]

    def changes(self, chunks: Sequence[Chunk]) -> BlockChanges:
        """Seat the sequences of a step and find out what is new of their blocks."""
        changes = BlockChanges([])
        for chunk in chunks:
            seat = self._seats.get(chunk.blocks_id) or self._take_seat(chunk.blocks_id, chunks)
            changes.seats.append(seat.index)
            num_needed = -(-chunk.end // self.block_size)
            if num_needed > seat.num_known:
                self._add(changes, seat, chunk, num_needed)
        return changes

    def apply(self, changes: BlockChanges, places: Tensor, blocks: Tensor) -> None:
        """``places`` and ``blocks``: those of ``changes``, int64 on any device of the cache."""
        if changes.places:
            for device, table in self._tables.items():
                table.view(-1).index_copy_(
                    0, places.to(device, non_blocking=True), blocks.to(table, non_blocking=True)
                )
        # Only now: after a failure on the way here they are sent again.
        for seat, num_known in changes.known_then:
            seat.num_known = num_known

    def _add(self, changes: BlockChanges, seat: _Seat, chunk: Chunk, num_needed: int) -> None:
        _, num_seats, width = self._shape
        for group, blocks in enumerate(chunk.blocks):
            first = (group * num_seats + seat.index) * width
            changes.places.extend(range(first + seat.num_known, first + num_needed))
            changes.blocks.extend(blocks[seat.num_known : num_needed])
        changes.known_then.append((seat, num_needed))

    def _take_seat(self, blocks_id: tuple[int, int], chunks: Sequence[Chunk]) -> _Seat:
        if not self._free:
            present = {chunk.blocks_id for chunk in chunks}
            for absent in [key for key in self._seats if key not in present]:
                self._free.append(self._seats.pop(absent).index)
        seat = self._seats[blocks_id] = _Seat(self._free.pop())
        return seat
