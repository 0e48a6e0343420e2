"""Steps in which sequences decode, the same operations on the same memory each time.

A decode step of a large model is over a thousand small operations, which take longer to launch from
Python than to compute. So the step is recorded once for each of a few sizes, as a CUDA graph
(``cuda_graphs``), and replayed: what differs from step to step is in one small tensor of inputs.
A step of fewer tokens than a size is filled up with padding, which costs a GPU next to nothing,
since it reads the weights once for all. Drafts are computed as tokens of their own.

The recording is handed in, so that the same code runs step by step where there is no GPU.
"""

import logging
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Final

import torch
from torch import Tensor

from gemma_serve.gemma.attention.device import DeviceBackend, StepTokens, upload_columns
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.out_of_memory import memory_errors

logger = logging.getLogger(__name__)

Compute = Callable[[], Tensor]
"""Computes from and into memory that stays."""
Record = Callable[[Compute], Compute]
"""Gives a cheaper way to do the same again."""

_NUM_INPUTS: Final = 4
"""Per token: its name, position, key end and seat."""

_MAX_CHUNK: Final = 16
"""Tokens of one sequence. Each reads the sequence's keys by itself, so more had better be computed
together."""

_MAX_RECORDING_S: Final = 60.0
"""A step takes well under a second to record. On a machine where it does not, serving must not
wait: the sizes that are left are computed without a recording."""


def recorded_sizes(max_num_tokens: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 12, 16, 24, 32, 48 and so on up to ``max_num_tokens``, which is always there.

    At most about a third of a step of more than eight tokens is padding.
    """
    sizes = {max_num_tokens}
    size = 1
    while size < max_num_tokens:
        sizes.add(size)
        if size >= 8 and size * 3 // 2 < max_num_tokens:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(sorted(sizes))


class DecodeSteps:
    """The steps of one model over one cache, by number of tokens."""

    def __init__(
        self,
        decoder: Decoder,
        embed: Callable[[Tensor], Tensor],
        backend: DeviceBackend,
        *,
        max_num_tokens: int,
        record: Record,
    ) -> None:
        """``embed``: names of ``TokenFeed``, ``[num_tokens]``, to ``[num_tokens, hidden_size]``."""
        self._decoder = decoder
        self._embed = embed
        self._backend = backend
        self._record = record
        self._sizes = recorded_sizes(max_num_tokens)
        self._device = backend.cache.layout.plane_devices[0]
        self._inputs = torch.zeros(_NUM_INPUTS * max_num_tokens, dtype=torch.int64).to(self._device)
        rows = torch.arange(max_num_tokens)
        self._tiles = torch.stack((rows, torch.ones_like(rows)), dim=1).to(self._device)
        self._recorded: dict[int, Compute] = {}

    @torch.inference_mode()
    def record(self) -> None:
        """Record all sizes, or none of them if one cannot be. Seconds."""
        start = perf_counter()
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            if perf_counter() - start > _MAX_RECORDING_S:
                logger.warning(
                    "recording decode steps took too long; those below %d run slower", size
                )
                break
            try:
                with memory_errors():
                    self._recorded[size] = self._record(partial(self._compute, size))
            except (RuntimeError, MemoryError) as error:
                self._recorded.clear()
                logger.warning(
                    "decode steps cannot be recorded, and each operation is launched by itself: %s",
                    error,
                )
                return
            logger.info("recorded the decode step of up to %d tokens", size)
        self._sizes = tuple(sorted(self._recorded))

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the step is one that was recorded: few tokens of each sequence and in all."""
        if not self._recorded:
            return False
        lengths = [chunk.end - chunk.start for chunk in chunks]
        return (
            max(lengths) <= _MAX_CHUNK
            and sum(lengths) <= self._sizes[-1]
            and not any(chunk.images for chunk in chunks)
        )

    def run(self, names: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """As ``Decoder.forward``, of the chunks' tokens; good until the next step.

        The host's part of the step is one copy to the device, which it does not wait for.
        """
        size = self._sizes[bisect_left(self._sizes, len(names))]
        tables = self._backend.tables
        changes = tables.changes(chunks)
        inputs = _inputs(names, chunks, changes.seats, size)
        columns = (changes.places, changes.blocks, inputs)
        places, blocks, new_inputs = upload_columns(columns, self._device)
        tables.apply(changes, places, blocks)
        self._inputs[: len(inputs)].copy_(new_inputs)
        return self._recorded[size]()[: len(names)]

    def _compute(self, size: int) -> Tensor:
        inputs = self._inputs[: _NUM_INPUTS * size].view(_NUM_INPUTS, size)
        names, positions, key_ends, seats = inputs.unbind()
        tiles = self._tiles[:size]
        tokens = StepTokens(positions, key_ends, seats, short_tiles=tiles, long_tiles=tiles[:0])
        return self._decoder.forward(self._embed(names), positions, self._backend.over(tokens))


def _inputs(
    names: Sequence[int], chunks: Sequence[Chunk], seats: Sequence[int], size: int
) -> "array[int]":
    padding = array("q", [0]) * (size - len(names))
    positions, seat_column = array("q"), array("q")
    for chunk, seat in zip(chunks, seats, strict=True):
        positions.extend(range(chunk.start, chunk.end))
        seat_column.extend([seat] * (chunk.end - chunk.start))
    inputs = array("q")
    for column in (names, positions, [position + 1 for position in positions], seat_column):
        inputs.extend(column)
        inputs.extend(padding)
    return inputs
