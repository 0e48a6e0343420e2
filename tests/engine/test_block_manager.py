from tests.engine.builders import make_block_manager


def test_a_table_gets_one_block_per_started_block_size_in_every_group() -> None:
    manager = make_block_manager(num_blocks=10, block_size=4, windows=(None, 8))
    table = manager.new_table()
    assert manager.allocate(table, 5)
    assert [len(blocks) for blocks in table.groups] == [2, 2]
    assert manager.num_free_blocks == 6


def test_growing_within_the_last_block_takes_nothing() -> None:
    manager = make_block_manager(num_blocks=10, block_size=4)
    table = manager.new_table()
    manager.allocate(table, 5)
    manager.allocate(table, 8)
    assert manager.num_free_blocks == 8


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    manager = make_block_manager(num_blocks=3, block_size=4, windows=(None, 8))
    table = manager.new_table()
    assert not manager.allocate(table, 5)
    assert manager.num_free_blocks == 3
    assert table.groups == [[], []]


def test_no_block_has_two_owners() -> None:
    manager = make_block_manager(num_blocks=8, block_size=4, windows=(None, 8))
    first, second = manager.new_table(), manager.new_table()
    manager.allocate(first, 8)
    manager.allocate(second, 8)
    owned = [block for table in (first, second) for group in table.groups for block in group]
    assert sorted(owned) == list(range(8))


def test_a_window_keeps_exactly_the_blocks_seen_from_behind_the_last_full_one() -> None:
    """The query at 12 with a window of 6 sees the keys 7 to 12: block 1 on, but not block 0."""
    manager = make_block_manager(num_blocks=10, block_size=4, windows=(None, 6))
    table = manager.new_table()
    manager.allocate(table, 12)
    manager.mark_computed(table, (), 11)  # the query at 8 sees the keys 3 to 8
    assert table.num_released == [0, 0]
    manager.mark_computed(table, (), 12)
    assert table.num_released == [0, 1]
    assert manager.num_free_blocks == 10 - 6 + 1


def test_freeing_returns_released_blocks_only_once() -> None:
    manager = make_block_manager(num_blocks=10, block_size=4, windows=(None, 6))
    table = manager.new_table()
    manager.allocate(table, 16)
    manager.mark_computed(table, (), 16)
    manager.free(table)
    assert manager.num_free_blocks == 10
    assert manager.num_held(table) == 0
    manager.allocate(table, 20)
    assert len({block for group in table.groups for block in group}) == 10


def test_blocks_for_is_what_a_sequence_really_holds_at_most() -> None:
    manager = make_block_manager(num_blocks=200, block_size=4, windows=(None, 10))
    for chunk_size in (1, 3, 16):
        table, most, computed = manager.new_table(), 0, 0
        while computed < 100:
            computed = min(100, computed + chunk_size)
            assert manager.allocate(table, computed)
            most = max(most, manager.num_held(table))
            manager.mark_computed(table, (), computed)
        assert most <= manager.blocks_for(100, chunk_size=chunk_size) <= most + 2
        manager.free(table)
