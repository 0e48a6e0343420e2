"""Decode steps over memory that stays: what a GPU replays, computed step by step."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.engine.sequence import Sequence
from gemma_serve.gemma.attention.device import DeviceBackend
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.decode_steps import Compute, DecodeSteps, recorded_sizes
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.token_feed import TokenFeed
from tests.engine.builders import make_sequence
from tests.gemma.dense_backend import DenseBackend
from tests.gemma.harness import loaded, prompt
from tests.tiny import tiny_vision_model

BLOCK_SIZE = 4
MAX_LEN = 64
MAX_NUM_SEQS = 6
MAX_NUM_TOKENS = 8
CPU = torch.device("cpu")


def as_it_is(compute: Compute) -> Compute:
    """Stands for a recording: computes again."""
    return compute


def dense_backend(cache: KVCache) -> DeviceBackend:
    return DenseBackend(cache, num_seats=MAX_NUM_SEQS, max_model_len=MAX_LEN)


class Runners:
    """One that launches every operation, and one that replays; each over a cache of its own."""

    def __init__(
        self,
        record: Callable[[Compute], Compute] = as_it_is,
        make_backend: Callable[[KVCache], DeviceBackend] = dense_backend,
        device: torch.device = CPU,
    ) -> None:
        model = tiny_vision_model(num_layers=6).to(device)
        gemma, decoder = loaded(model), Decoder(model)
        text_model = model.get_decoder()
        layout = CacheLayout.of(text_model.config, [device] * 6, torch.float32)
        self.blocks = BlockManager(num_blocks=900, block_size=BLOCK_SIZE, windows=layout.windows)
        sampler = Sampler(vocab_size=512, forbidden_token_ids=(), device=device)
        caches = [KVCache(layout, num_blocks=900, block_size=BLOCK_SIZE) for _ in range(2)]
        backend = make_backend(caches[1])
        feed = TokenFeed(max_rows=MAX_NUM_TOKENS, device=device)
        self.steps = DecodeSteps(
            decoder,
            lambda names: text_model.embed_tokens(feed.token_ids(names)),
            backend,
            max_num_tokens=MAX_NUM_TOKENS,
            record=record,
        )
        self.eager = GemmaModelRunner(gemma, decoder, caches[0], sampler, ReferenceAttention, feed)
        self.replaying = GemmaModelRunner(
            gemma, decoder, caches[1], sampler, backend.begin, feed, decode_steps=self.steps
        )
        self.replaying.record_decode_steps()
        self._num_sequences = 0

    def sequence(self, num_tokens: int, *, images: tuple[tuple[int, int], ...] = ()) -> Sequence:
        sequence = make_sequence(self.blocks, arrival=self._num_sequences)
        self._num_sequences += 1
        sequence.prompt = prompt(num_tokens, images=images, seed=num_tokens)
        sequence.token_ids = list(sequence.prompt.token_ids)
        assert self.blocks.allocate(sequence.block_table, num_tokens)
        return sequence

    def logits(self, *chunks: tuple[Sequence, int, int]) -> tuple[Tensor, Tensor]:
        """Of a step that computes these tokens, by both."""
        batch = batch_of(*chunks)
        return self.eager.logits(batch), self.replaying.logits(batch)


def batch_of(*chunks: tuple[Sequence, int, int]) -> ScheduledBatch:
    return ScheduledBatch(tuple(ScheduledSequence(*chunk, samples=True) for chunk in chunks))


def assert_alike(logits: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-5)


def test_sizes_grow_with_at_most_a_third_of_padding_up_to_the_limit() -> None:
    assert recorded_sizes(1) == (1,)
    assert recorded_sizes(6) == (1, 2, 4, 6)
    assert recorded_sizes(32) == (1, 2, 4, 8, 12, 16, 24, 32)
    assert recorded_sizes(100) == (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 100)


@pytest.mark.parametrize("num_seqs", range(1, MAX_NUM_SEQS + 1))
def test_any_number_of_sequences_decodes_as_without_recording(num_seqs: int) -> None:
    runners = Runners()
    lengths = (5, 40, 16, 17, 30, 9)[:num_seqs]
    sequences = [runners.sequence(length) for length in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        assert_alike(runners.logits((sequence, 0, length - 3)))
    for back in (3, 2, 1):
        chunks = [
            (sequence, length - back, length - back + 1)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        assert_alike(runners.logits(*chunks))


def test_replayed_steps_and_others_take_turns_over_one_cache() -> None:
    runners = Runners()
    first, second = runners.sequence(20), runners.sequence(30, images=((12, 16),))
    assert_alike(runners.logits((first, 0, 10)))
    assert_alike(runners.logits((first, 10, 11)))
    assert_alike(runners.logits((first, 11, 12), (second, 0, 20)))
    assert_alike(runners.logits((first, 12, 13), (second, 20, 21)))
    assert_alike(runners.logits((second, 21, 22), (first, 13, 14)))


def test_drafts_are_replayed_as_tokens_of_their_own() -> None:
    runners = Runners()
    first, second = runners.sequence(40), runners.sequence(20)
    for sequence in (first, second):
        assert_alike(runners.logits((sequence, 0, 10)))
    assert_alike(runners.logits((first, 10, 15), (second, 10, 12)))
    assert_alike(runners.logits((first, 12, 16), (second, 12, 16)))  # some were not accepted


def test_a_step_of_many_tokens_or_with_an_image_is_not_replayed() -> None:
    runners = Runners()
    long, short = runners.sequence(60), runners.sequence(20)
    assert runners.steps.takes([chunk_of(long, 7, 8), chunk_of(short, 0, 7)])
    assert not runners.steps.takes([chunk_of(long, 7, 9), chunk_of(short, 0, 7)])
    image = Chunk(0, 3, 7, ((3, 7),), ((0, 1),), (0, 0))
    assert not runners.steps.takes([image])


def chunk_of(sequence: Sequence, start: int, end: int) -> Chunk:
    return Chunk(0, start, end, (), tuple(sequence.block_table.groups), (sequence.arrival, 0))


def test_what_cannot_be_recorded_is_computed_without(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(compute: Compute) -> Compute:
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        runners = Runners(refuse)
    assert "cannot be recorded" in caplog.text
    sequence = runners.sequence(20)
    assert_alike(runners.logits((sequence, 0, 10)))
    assert_alike(runners.logits((sequence, 10, 11)))


def test_padding_is_written_nowhere() -> None:
    """Also not over the first token of whoever has block 0."""
    runners = Runners()
    sequences = [runners.sequence(12) for _ in range(5)]
    assert 0 in sequences[0].block_table.groups[0]
    for sequence in sequences:
        assert_alike(runners.logits((sequence, 0, 10)))
    assert_alike(runners.logits(*((sequence, 10, 11) for sequence in sequences)))
    assert_alike(runners.logits((sequences[0], 11, 12)))


def test_a_token_that_the_host_awaits_is_the_one_that_the_step_before_sampled() -> None:
    runners = Runners()
    first, second, third = (runners.sequence(length) for length in (13, 9, 20))
    for sequence in (first, second, third):
        assert runners.blocks.allocate(sequence.block_table, len(sequence.token_ids) + 1)
    assert_alike(runners.logits((first, 0, 12), (second, 0, 8)))
    assert_alike(runners.logits((third, 0, 15)))
    step = runners.replaying.begin(batch_of((second, 8, 9), (first, 12, 13)))
    runners.eager.begin(batch_of((second, 8, 9), (first, 12, 13)))
    step.sample()
    decoding = (first, 13, 14), (second, 9, 10)
    batches = batch_of(*decoding), batch_of(*decoding, (third, 15, 20))
    assert all(s.is_awaited for s in batches[0].scheduled)
    awaited = [runner.logits(b) for b in batches for runner in (runners.eager, runners.replaying)]
    for sequence, token in zip((second, first), step.tokens(), strict=True):
        assert token.token_id is not None
        sequence.token_ids.append(token.token_id)
    assert not any(s.is_awaited for s in batches[0].scheduled)
    known = [runner.logits(b) for b in batches for runner in (runners.eager, runners.replaying)]
    for of_awaited, of_known in zip(awaited, known, strict=True):
        assert_alike((of_awaited, of_known))
