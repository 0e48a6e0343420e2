from gemma_serve.gemma.attention.step import Chunk, Segment


def make_chunk(start: int, end: int, *images: tuple[int, int], row: int = 0) -> Chunk:
    return Chunk(row=row, start=start, end=end, images=images, blocks=(), blocks_id=(0, 0))


def test_text_is_one_causal_segment() -> None:
    assert list(make_chunk(3, 9, row=2).segments()) == [Segment(2, 3, 9, causal=True)]


def test_images_cut_the_text_around_them() -> None:
    assert list(make_chunk(3, 20, (5, 9), (9, 13), row=1).segments()) == [
        Segment(1, 3, 5, causal=True),
        Segment(3, 5, 9, causal=False),
        Segment(7, 9, 13, causal=False),
        Segment(11, 13, 20, causal=True),
    ]


def test_an_image_at_either_end_leaves_no_empty_segment() -> None:
    assert list(make_chunk(0, 8, (0, 4), (4, 8)).segments()) == [
        Segment(0, 0, 4, causal=False),
        Segment(4, 4, 8, causal=False),
    ]


def test_a_segment_reads_no_key_behind_its_first_querys_window() -> None:
    segment = Segment(0, 20, 25, causal=True)
    assert [segment.first_key(window) for window in (None, 1, 6, 50)] == [0, 20, 15, 0]
