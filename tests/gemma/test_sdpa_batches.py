"""How decoding sequences are dealt into padded batches."""

import torch

from gemma_serve.gemma.attention.sdpa import MAX_GATHERED_KEYS, SdpaAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from tests.tiny import tiny_text_model


def batches(*lengths: int, group: int = 0) -> list[list[int]]:
    """The lengths of the sequences in each batch, of full layers unless ``group`` says else."""
    config = tiny_text_model().config
    layout = CacheLayout.of(config, [torch.device("cpu")] * 6, torch.float32)
    chunks = [
        Chunk(row=row, start=length - 1, end=length, images=(), blocks=(), blocks_id=(row, 0))
        for row, length in enumerate(lengths)
    ]
    attention = SdpaAttention(KVCache(layout, num_blocks=1, block_size=1), chunks)
    return [
        [chunk.end for chunk in batch] for batch in attention._decode_batches(layout.windows[group])
    ]


def test_short_sequences_share_a_batch_whatever_their_lengths() -> None:
    assert batches(200, 3, 90) == [[200, 3, 90]]


def test_a_long_chat_does_not_make_short_ones_read_as_much() -> None:
    assert batches(8000, 10, 20, 7000) == [[10, 20], [8000, 7000]]


def test_a_batch_reads_a_bounded_number_of_keys() -> None:
    half = MAX_GATHERED_KEYS // 2
    assert batches(half, half, half) == [[half, half], [half]]


def test_a_single_sequence_may_be_longer_than_the_bound() -> None:
    assert batches(2 * MAX_GATHERED_KEYS) == [[2 * MAX_GATHERED_KEYS]]


def test_a_window_makes_all_long_sequences_alike() -> None:
    assert len(batches(8000, 10, 20, 7000, group=1)) == 1
