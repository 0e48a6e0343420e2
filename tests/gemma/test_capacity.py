"""How many chats the cache holds, by the allocator's own account, on the shapes of Gemma 3 27B."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.engine.block_manager import BlockManager, BlockTable
from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.kv_cache import CacheLayout
from tests.engine.builders import make_scheduler, make_sequence

GIB = 2**30
BLOCK_SIZE = 16
CONFIG = dummy_config("27b").get_text_config()
LAYOUT = CacheLayout.of(CONFIG, [torch.device("meta")] * CONFIG.num_hidden_layers, torch.bfloat16)
BYTES_PER_BLOCK = LAYOUT.bytes_per_block(BLOCK_SIZE)
BYTES_PER_KEY = 2 * 16 * 128 * 2
"""Key and value of one token in one layer: 16 heads of 128 bfloat16 numbers each."""


def block_manager(num_bytes: float) -> BlockManager:
    return BlockManager(
        num_blocks=int(num_bytes // BYTES_PER_BLOCK),
        block_size=BLOCK_SIZE,
        windows=LAYOUT.windows,
    )


def num_layers(window: int | None) -> int:
    kinds = Counter(CONFIG.layer_types)
    return kinds["full_attention"] if window is None else kinds["sliding_attention"]


def bytes_needed(num_tokens: int) -> int:
    """What the next token of a sequence of ``num_tokens`` sees, in whole blocks, layer by layer.

    Full layers see all of it, sliding ones the last 1,024 tokens.
    """
    num_keys = sum(
        num_layers(window) * -(-min(num_tokens, window or num_tokens) // BLOCK_SIZE) * BLOCK_SIZE
        for window in set(LAYOUT.windows)
    )
    return num_keys * BYTES_PER_KEY


def decode(manager: BlockManager, table: BlockTable, num_tokens: int) -> None:
    """Bring a sequence to ``num_tokens``, the last of which is in its step."""
    computed = num_tokens - 1
    while table.num_full * BLOCK_SIZE < computed // BLOCK_SIZE * BLOCK_SIZE:
        end = min(computed, (table.num_full + 1) * BLOCK_SIZE)
        assert manager.allocate(table, end)
        manager.mark_computed(table, (), end)
    assert manager.allocate(table, num_tokens)


def test_the_shapes_are_those_of_27b() -> None:
    assert (num_layers(None), num_layers(1024)) == (10, 52)
    assert set(LAYOUT.windows) == {None, 1024}
    assert bytes_needed(8192) / GIB == pytest.approx(1.03, abs=0.005)


@pytest.mark.parametrize(("num_chats", "num_tokens"), [(17, 8192), (31, 2048)])
def test_so_many_chats_fit_in_what_one_80_gb_gpu_leaves(num_chats: int, num_tokens: int) -> None:
    manager = block_manager(18.5 * GIB)
    for _ in range(num_chats):
        decode(manager, manager.new_table(), num_tokens)


@pytest.mark.parametrize(
    ("num_chats", "num_prompt_tokens", "num_tokens"), [(17, 8000, 8192), (31, 1024, 2048)]
)
def test_they_are_all_started_and_none_is_computed_twice(
    num_chats: int, num_prompt_tokens: int, num_tokens: int
) -> None:
    manager = block_manager(18.5 * GIB)
    scheduler = make_scheduler(manager, max_num_seqs=num_chats, prefill_chunk_size=512)
    for arrival in range(num_chats):
        scheduler.add(make_sequence(manager, num_prompt_tokens=num_prompt_tokens, arrival=arrival))
    num_computed = 0
    while (batch := scheduler.schedule()) is not None:
        scheduler.mark_computed(batch)
        num_computed += sum(s.end - s.start for s in batch.scheduled)
        for scheduled in batch.sampling:
            if scheduled.end < num_tokens:
                scheduled.sequence.token_ids.append(7)
    assert scheduler.num_running == num_chats
    assert num_computed == num_chats * num_tokens


def test_a_chat_of_128k_leaves_8_gib_for_others() -> None:
    manager = block_manager(18.5 * GIB)
    decode(manager, manager.new_table(), 131_072)
    assert manager.num_free_blocks * BYTES_PER_BLOCK > 8 * GIB


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 16_384), min_size=1, max_size=8))
def test_any_mix_of_chats_wastes_less_than_a_tenth(lengths: list[int]) -> None:
    """Waste: bytes of blocks that live sequences hold beyond what their next tokens see, in whole
    blocks of each layer."""
    manager = block_manager(200 * GIB)
    for num_tokens in lengths:
        decode(manager, manager.new_table(), num_tokens)
    held = (manager.num_blocks - manager.num_free_blocks) * BYTES_PER_BLOCK
    needed = sum(map(bytes_needed, lengths))
    assert needed <= held < needed / 0.9
