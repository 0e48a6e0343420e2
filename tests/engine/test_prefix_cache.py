"""What of a finished sequence the next one takes up, and what is given up first."""

from gemma_serve.engine.block_manager import BlockManager, BlockTable
from gemma_serve.engine.sequence import PromptInputs, Sequence
from tests.engine.builders import make_block_manager, make_sharing_sequence


def sequence_of(
    manager: BlockManager, num_tokens: int, *, start: int = 0, salt: str | None = None
) -> Sequence:
    """Tokens ``start``, ``start + 1`` and so on."""
    prompt = PromptInputs(tuple(range(start, start + num_tokens)))
    return make_sharing_sequence(manager, prompt, salt=salt)


def num_cached(manager: BlockManager, sequence: Sequence) -> int:
    """Tokens that ``sequence`` would find cached."""
    prefix = manager.find_prefix(sequence.block_table, len(sequence.token_ids) - 1)
    return prefix.num_blocks * manager.block_size


def compute(manager: BlockManager, sequence: Sequence, *, chunk_size: int = 100) -> BlockTable:
    """Take up what is cached and compute the rest."""
    table, num_tokens = sequence.block_table, len(sequence.token_ids)
    manager.take_prefix(table, manager.find_prefix(table, num_tokens - 1))
    computed = table.num_full * manager.block_size
    while computed < num_tokens:
        computed = min(num_tokens, computed + chunk_size)
        assert manager.allocate(table, computed)
        manager.mark_computed(table, sequence.token_ids, computed)
    return table


def grow(manager: BlockManager, sequence: Sequence, num_tokens: int) -> None:
    """Compute ``num_tokens`` completion tokens, one by one."""
    for token_id in range(num_tokens):
        sequence.token_ids.append(token_id)
        assert manager.allocate(sequence.block_table, len(sequence.token_ids))
        manager.mark_computed(sequence.block_table, sequence.token_ids, len(sequence.token_ids))


def exhaust(manager: BlockManager, num_left: int) -> None:
    """Take free blocks for good until ``num_left`` are left."""
    table = manager.new_table()
    num_entries = (manager.num_free_blocks - num_left) // len(table.groups)
    assert manager.allocate(table, num_entries * manager.block_size)


def test_a_prompt_again_is_cached_but_for_its_last_token() -> None:
    manager = make_block_manager()
    manager.free(compute(manager, sequence_of(manager, 12)))
    assert num_cached(manager, sequence_of(manager, 12)) == 8
    assert num_cached(manager, sequence_of(manager, 13)) == 12


def test_a_running_sequence_shares_what_it_has_computed_and_nothing_else() -> None:
    manager = make_block_manager(num_blocks=100)
    first = sequence_of(manager, 20)
    manager.allocate(first.block_table, 20)
    assert num_cached(manager, sequence_of(manager, 20)) == 0
    manager.mark_computed(first.block_table, first.token_ids, 11)
    assert num_cached(manager, sequence_of(manager, 20)) == 8
    second = sequence_of(manager, 20)
    compute(manager, second)
    assert second.block_table.groups[0][:2] == first.block_table.groups[0][:2]
    assert manager.num_free_blocks == 100 - 5 - 3


def test_another_salt_finds_nothing() -> None:
    manager = make_block_manager()
    manager.free(compute(manager, sequence_of(manager, 12, salt="a")))
    assert num_cached(manager, sequence_of(manager, 12, salt="b")) == 0
    assert num_cached(manager, sequence_of(manager, 12, salt="a")) == 8


def test_the_answer_is_cached_for_the_next_turn() -> None:
    manager = make_block_manager(windows=(None, 8))
    chat = sequence_of(manager, 10)
    compute(manager, chat)
    grow(manager, chat, 15)
    manager.free(chat.block_table)
    next_turn = make_sharing_sequence(manager, PromptInputs((*chat.token_ids, 7, 7, 7, 7)))
    assert num_cached(manager, next_turn) == 24


def test_a_hit_needs_only_the_window_of_a_group_that_has_one() -> None:
    """At the end of 24 tokens a window of 8 begins at 17, in block 4."""
    manager = make_block_manager(num_blocks=100, windows=(None, 8))
    manager.free(compute(manager, sequence_of(manager, 24)))
    hit = sequence_of(manager, 25)
    table = hit.block_table
    manager.take_prefix(table, manager.find_prefix(table, 24))
    assert (len(table.groups[0]), len(table.groups[1])) == (6, 6)
    assert table.num_released == [0, 4]
    assert manager.num_held(table) == 6 + 2


def test_a_shared_beginning_is_found_although_its_window_has_moved_on() -> None:
    manager = make_block_manager(num_blocks=200, windows=(None, 8))
    compute(manager, sequence_of(manager, 60), chunk_size=4)
    other = make_sharing_sequence(manager, PromptInputs((*range(30), *range(500, 520))))
    assert num_cached(manager, other) == 28


def test_the_longest_prefix_whose_windows_are_there_is_taken() -> None:
    """Memory is short, so the window before the parting of the ways has been reused."""
    manager = make_block_manager(num_blocks=40, windows=(None, 8))
    manager.free(compute(manager, sequence_of(manager, 60), chunk_size=4))
    exhaust(manager, manager.num_cached_blocks - 8)
    other = make_sharing_sequence(manager, PromptInputs((*range(40), *range(500, 502))))
    assert num_cached(manager, other) == 40
    earlier = make_sharing_sequence(manager, PromptInputs((*range(24), *range(500, 502))))
    assert num_cached(manager, earlier) == 0


def test_blocks_that_left_a_window_go_before_anything_that_a_chat_needs_to_go_on() -> None:
    manager = make_block_manager(num_blocks=60, windows=(None, 8))
    manager.free(compute(manager, sequence_of(manager, 60), chunk_size=4))
    exhaust(manager, 15 + 3)  # all 15 blocks of the full group, and the last window's 2 or 3
    assert num_cached(manager, sequence_of(manager, 61)) == 60


def test_the_end_of_the_prompt_stays_cached_when_the_answer_grows_past_the_window() -> None:
    """So that another answer to the same prompt, or an edited last message, finds it."""
    manager = make_block_manager(num_blocks=60, windows=(None, 8))
    chat = sequence_of(manager, 41)
    compute(manager, chat, chunk_size=4)
    grow(manager, chat, 20)
    manager.free(chat.block_table)
    exhaust(manager, 15 + 3 + 3)
    assert num_cached(manager, sequence_of(manager, 41)) == 40


def test_where_a_second_prompt_parted_stays_cached_for_the_third() -> None:
    """The second comes too late for the first one's window, and its own is kept in its stead."""
    manager = make_block_manager(num_blocks=80, windows=(None, 8))
    shared = tuple(range(32))
    for question in (100, 200, 300):
        prompt = PromptInputs((*shared, *range(question, question + 28)))
        asked = make_sharing_sequence(manager, prompt)
        cached = num_cached(manager, asked)
        assert cached == (32 if question == 300 else 0)
        compute(manager, asked, chunk_size=4)
        manager.free(asked.block_table)
        somebody_else = manager.new_table()
        num_passing = manager.num_free_blocks - len(manager._cache._lasting)
        assert manager.allocate(somebody_else, num_passing // 2 * manager.block_size)
        manager.free(somebody_else)


def test_a_chain_loses_its_end_first() -> None:
    manager = make_block_manager(num_blocks=10)
    manager.free(compute(manager, sequence_of(manager, 40)))
    exhaust(manager, 6)
    assert num_cached(manager, sequence_of(manager, 41)) == 24


def test_what_was_used_last_is_given_up_last() -> None:
    manager = make_block_manager(num_blocks=8)
    for start in (0, 1000, 0):
        manager.free(compute(manager, sequence_of(manager, 16, start=start)))
    exhaust(manager, 4)
    assert num_cached(manager, sequence_of(manager, 17)) == 16
    assert num_cached(manager, sequence_of(manager, 17, start=1000)) == 0


def test_the_newer_of_two_equal_blocks_is_kept_and_the_idle_one_given_back() -> None:
    manager = make_block_manager(num_blocks=10)
    first, second = sequence_of(manager, 8), sequence_of(manager, 8)
    manager.allocate(first.block_table, 8)
    manager.allocate(second.block_table, 8)
    manager.mark_computed(first.block_table, first.token_ids, 8)
    manager.free(first.block_table)
    manager.mark_computed(second.block_table, second.token_ids, 8)
    assert manager.num_cached_blocks == 0
    assert manager.num_free_blocks == 8
    manager.free(second.block_table)
    assert manager.num_cached_blocks == 2
