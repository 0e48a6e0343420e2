"""What attention kernels on a device are told of a step."""

from functools import partial

import pytest
import torch

from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.native import NativeAttention
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.attention.varlen import VarlenAttention
from gemma_serve.gemma.kv_cache import KVCache
from tests.gemma.dense_backend import DenseBackend
from tests.gemma.dense_varlen import dense_varlen_attn
from tests.gemma.native_kernels import needs_kernels
from tests.gemma.paged_step import PagedStep, Span, assert_equal_to_reference, text

WINDOW = 16
STEPS: dict[str, list[Span]] = {
    "decoding around the window": [text(n - 1, n) for n in (1, 15, 16, 17, 33, 50)],
    "whole prompts": [text(0, n) for n in (1, 15, 16, 17, 37)],
    "chunks at block borders": [text(3, 4), text(4, 8), text(7, 9), text(12, 13), text(16, 29)],
    "prompts beside answers": [text(20, 21), text(0, 7), text(39, 40), text(30, 47)],
    "images": [(0, 20, ((0, 4), (6, 10))), (30, 41, ((37, 41),)), (9, 10, ((9, 10),))],
    "an image longer than the window": [(2, 40, ((5, 30),)), text(25, 26)],
}


def dense(step: PagedStep, cache: KVCache) -> AttentionFactory:
    return DenseBackend(cache, num_seats=len(step.spans), max_model_len=step.max_len).begin


def varlen(step: PagedStep, cache: KVCache) -> AttentionFactory:
    tables = BlockTables(cache, num_seats=len(step.spans), max_model_len=step.max_len)
    return lambda cache, chunks: VarlenAttention(dense_varlen_attn, tables, cache, chunks)


def native(step: PagedStep, cache: KVCache) -> AttentionFactory:
    tables = BlockTables(cache, num_seats=len(step.spans), max_model_len=step.max_len)
    return partial(NativeAttention, tables)


MAKERS = [dense, pytest.param(native, marks=needs_kernels), varlen]


@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("block_size", [4, 7, 64])
def test_positions_tables_and_ends_say_what_every_query_sees(
    make: type, spans: list[Span], block_size: int
) -> None:
    step = PagedStep(spans=spans, window=WINDOW, block_size=block_size)
    assert_equal_to_reference(step, lambda cache: make(step, cache))


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_without_new_blocks_is_told_of_none(make: type) -> None:
    """Fifteen of sixteen decode steps have none."""
    step = PagedStep(spans=[text(17, 18)], window=WINDOW)
    cache = KVCache(step.layout(), num_blocks=10, block_size=step.block_size)
    begin = make(step, cache)
    first, second = (
        Chunk(0, end - 1, end, (), ((1, 2, 3, 4, 5), (6, 7, 8, 9, 0)), blocks_id=(0, 0))
        for end in (17, 18)
    )
    begin(cache, [first])
    heads = torch.randn(1, 2, 16, generator=step.generator)
    got = begin(cache, [second]).attend(0, heads, heads, heads, 0.5)
    expected = ReferenceAttention(cache, [second]).attend(0, heads, heads, heads, 0.5)
    torch.testing.assert_close(got, expected)


def tables(num_seats: int = 3, max_model_len: int = 20) -> BlockTables:
    step = PagedStep(spans=[text(0, 4)])
    cache = KVCache(step.layout(), num_blocks=1, block_size=4)
    return BlockTables(cache, num_seats=num_seats, max_model_len=max_model_len)


def chunk(end: int, *, of: int, num_freed: int = 0, first_block: int = 10) -> Chunk:
    """Of the sequence ``of``, whose blocks count up from ``first_block`` in both groups."""
    blocks = list(range(first_block, first_block + -(-end // 4)))
    of_groups = (blocks, [block + 100 for block in blocks])
    return Chunk(0, end - 1, end, (), of_groups, blocks_id=(of, num_freed))


def tell(tables: BlockTables, *chunks: Chunk) -> tuple[list[int], int]:
    """The seats, and how many blocks had to be sent."""
    changes = tables.changes(chunks)
    places, blocks = (torch.tensor(list(c)) for c in (changes.places, changes.blocks))
    tables.apply(changes, places, blocks)
    return changes.seats, len(changes.places)


def test_a_step_sends_only_the_blocks_that_were_added() -> None:
    ours = tables()
    assert tell(ours, chunk(9, of=1)) == ([0], 6)
    assert tell(ours, chunk(12, of=1)) == ([0], 0)
    assert tell(ours, chunk(13, of=1)) == ([0], 2)
    assert ours.on(torch.device("cpu"))[:, 0].tolist() == [
        [10, 11, 12, 13, 0],
        [110, 111, 112, 113, 0],
    ]


def test_a_sequence_that_was_preempted_gets_its_new_blocks_sent() -> None:
    ours = tables()
    tell(ours, chunk(9, of=1))
    seats, num_sent = tell(ours, chunk(9, of=1, num_freed=1, first_block=50))
    assert num_sent == 6
    assert ours.on(torch.device("cpu"))[0, seats[0]].tolist() == [50, 51, 52, 0, 0]


def test_seats_of_sequences_that_ended_are_given_to_new_ones() -> None:
    ours = tables(num_seats=2)
    tell(ours, chunk(4, of=1), chunk(4, of=2, first_block=20))
    seats, num_sent = tell(ours, chunk(5, of=2, first_block=20), chunk(5, of=3, first_block=30))
    assert (seats, num_sent) == ([1, 0], 2 + 4)
    assert ours.on(torch.device("cpu"))[0].tolist() == [[30, 31, 0, 0, 0], [20, 21, 0, 0, 0]]


def test_what_a_failed_step_did_not_send_is_sent_by_the_next() -> None:
    ours = tables()
    ours.changes([chunk(9, of=1)])  # and then the device had no memory
    assert tell(ours, chunk(9, of=1)) == ([0], 6)
