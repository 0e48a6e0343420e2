from collections.abc import Sequence

import pytest

from gemma_serve.engine.block_chain import BlockChain, ImageContent

RED = ImageContent(6, 12, b"red")
BLUE = ImageContent(6, 12, b"blue")


def digests(
    token_ids: Sequence[int], *, images: Sequence[ImageContent] = (), salt: str | None = None
) -> list[bytes]:
    chain = BlockChain(block_size=4, images=images, salt=salt)
    chain.extend(token_ids, len(token_ids))
    return chain.digests


def test_only_full_blocks_have_a_digest() -> None:
    assert [len(digests(range(n))) for n in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_equal_tokens_after_different_ones_differ() -> None:
    first, second = digests([1, 2, 3, 4, 9, 9, 9, 9]), digests([5, 2, 3, 4, 9, 9, 9, 9])
    assert set(first).isdisjoint(second)


def test_token_by_token_gives_the_same_digests_as_at_once() -> None:
    token_ids = list(range(1000, 1014))
    chain = BlockChain(block_size=4)
    for num_tokens in range(len(token_ids) + 1):
        chain.extend(token_ids, num_tokens)
    assert chain.digests == digests(token_ids)


def test_tokens_that_are_not_computed_yet_have_no_digest() -> None:
    chain = BlockChain(block_size=4)
    chain.extend(range(12), 9)
    assert chain.digests == digests(range(12))[:2]


def test_another_picture_in_the_same_place_changes_its_first_block_and_all_later_ones() -> None:
    red, blue = digests(range(16), images=[RED]), digests(range(16), images=[BLUE])
    assert [r == b for r, b in zip(red, blue, strict=True)] == [True, False, False, False]


def test_another_salt_changes_everything() -> None:
    chains = [digests(range(8), salt=salt) for salt in (None, "a", "b", "")]
    assert len({digest for chain in chains for digest in chain}) == 8


def test_a_copy_goes_on_by_itself() -> None:
    chain = BlockChain(block_size=4, salt="a")
    chain.extend(range(4), 4)
    twin = chain.copy()
    twin.extend(range(8), 8)
    assert len(chain.digests) == 1
    assert twin.digests == digests(range(8), salt="a")


@pytest.mark.parametrize(
    ("num_blocks", "end"), [(1, 1), (2, 1), (3, 3), (4, 4), (5, 4), (6, 4), (7, 7)]
)
def test_no_prefix_ends_inside_an_image(num_blocks: int, end: int) -> None:
    """The first image fills the positions 6 to 11, the second one 17 to 26."""
    chain = BlockChain(block_size=4, images=[RED, ImageContent(17, 27, b"")])
    assert chain.last_whole_end(num_blocks) == end


def test_an_end_before_one_image_is_not_inside_the_one_before_it() -> None:
    chain = BlockChain(block_size=4, images=[ImageContent(2, 9, b""), ImageContent(9, 15, b"")])
    assert chain.last_whole_end(3) == 0
