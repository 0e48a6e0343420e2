"""Any load on any pool: blocks are neither lost nor mixed up, and everybody is served."""

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.scheduler import ScheduledBatch, Scheduler
from gemma_serve.engine.sequence import ImageSpan, PromptInputs, Sequence
from tests.engine.builders import make_block_manager, make_scheduler, make_sharing_sequence
from tests.engine.written_cache import WrittenCache

BLOCK_SIZE = 4
IMAGE_TOKENS = 6
"""More than a block, so that images lie across borders."""
MAX_LEN = 72
IMAGE_TOKEN_ID = 99


@dataclass
class Load:
    """Sequences that come and go at random, and what must hold after each step."""

    rng: random.Random
    windows: tuple[int | None, ...]
    num_spare_blocks: int
    max_num_seqs: int
    chunk_size: int
    lengths: dict[Sequence, int] = field(default_factory=dict)
    """How long each unfinished sequence will be."""
    num_arrived: int = 0
    num_cached_tokens: int = 0
    texts: list[PromptInputs] = field(default_factory=list)
    """Prompts and whole chats so far, for others to begin with."""

    def __post_init__(self) -> None:
        sizing = make_block_manager(num_blocks=0, windows=self.windows)
        num_blocks = sizing.blocks_for(MAX_LEN, chunk_size=self.chunk_size) + self.num_spare_blocks
        self.blocks: BlockManager = make_block_manager(num_blocks=num_blocks, windows=self.windows)
        self.cache = WrittenCache(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, windows=self.windows
        )
        self.scheduler: Scheduler = make_scheduler(
            self.blocks, max_num_seqs=self.max_num_seqs, prefill_chunk_size=self.chunk_size
        )

    def arrive(self) -> None:
        prompt = self._prompt()
        user, salt = self.rng.choice([None, "ann", "bob"]), self.rng.choice([None, None, "salt"])
        for _ in range(self.rng.choice([1, 1, 3])):
            sequence = make_sharing_sequence(
                self.blocks, prompt, arrival=self.num_arrived, user=user, salt=salt
            )
            num_prompt = len(prompt.token_ids)
            self.lengths[sequence] = self.rng.randint(num_prompt + 1, min(num_prompt + 12, MAX_LEN))
            self.scheduler.add(sequence)
            self.num_arrived += 1

    def step(self) -> ScheduledBatch | None:
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        num_prefill = sum(s.end - s.start for s in batch.scheduled if s.end - s.start > 1)
        assert num_prefill <= self.chunk_size
        assert self.scheduler.num_running <= self.max_num_seqs
        for scheduled in batch.scheduled:
            for image in scheduled.sequence.prompt.images:
                assert not image.start < scheduled.start < image.end
                assert not image.start < scheduled.end < image.end
        self.cache.run(batch)
        self.scheduler.mark_computed(batch)
        for scheduled in batch.sampling:
            self._take_in(scheduled.sequence)
        if self.lengths and self.rng.random() < 0.05:
            self._end(self.rng.choice(list(self.lengths)))
        self.check_blocks()
        return batch

    def check_blocks(self) -> None:
        """Every block is free or held, by as many as share it."""
        held = Counter(
            (block, group)
            for sequence in self.lengths
            for group, blocks in enumerate(sequence.block_table.groups)
            for block in blocks[sequence.block_table.num_released[group] :]
        )
        assert len({block for block, _ in held}) == len(held)  # no block in two groups
        assert self.blocks.num_free_blocks == self.blocks.num_blocks - len(held)
        num_users = {block: users for (block, _), users in held.items()}
        for block in range(self.blocks.num_blocks):
            assert self.blocks._num_users[block] == num_users.get(block, 0)

    def _prompt(self) -> PromptInputs:
        """New text, or an earlier one up to anywhere and then new text, also with images."""
        token_ids: list[int] = []
        images: list[ImageSpan] = []
        if self.texts and self.rng.random() < 0.8:
            earlier = self.rng.choice(self.texts)
            end = self.rng.randint(1, len(earlier.token_ids))
            images = [image for image in earlier.images if image.end <= end]
            cut = [image.start for image in earlier.images if image.start < end < image.end]
            token_ids = list(earlier.token_ids[: min([end, *cut])])
        longest = MAX_LEN - 14
        while (room := longest - len(token_ids)) > 0 and self.rng.random() < 0.7:
            if self.chunk_size >= IMAGE_TOKENS <= room and self.rng.random() < 0.4:
                view = bytes([self.rng.randint(0, 1)])
                images.append(ImageSpan(len(token_ids), IMAGE_TOKENS, view))
                token_ids += [IMAGE_TOKEN_ID] * IMAGE_TOKENS
            else:
                token_ids += [self.rng.randint(0, 1) for _ in range(self.rng.randint(1, room))]
        text = PromptInputs(tuple(token_ids[:longest]) or (1,), tuple(images))
        self.texts.append(text)
        return text

    def _take_in(self, sequence: Sequence) -> None:
        if len(sequence.token_ids) == len(sequence.prompt.token_ids):
            self.num_cached_tokens += sequence.num_cached_tokens
        sequence.token_ids.append(self.rng.randint(0, 1))
        if len(sequence.token_ids) >= self.lengths[sequence]:
            self.texts.append(PromptInputs(tuple(sequence.token_ids[:-1]), sequence.prompt.images))
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove([sequence])
        del self.lengths[sequence]


@settings(deadline=None, max_examples=150)
@given(
    windows=st.sampled_from([(None,), (None, 8), (6,), (None, 5, 5), (None, None, 8, 8), (3, 9)]),
    num_spare_blocks=st.integers(0, 60),
    max_num_seqs=st.integers(1, 6),
    chunk_size=st.integers(1, 24),
    num_requests=st.integers(1, 14),
    seed=st.integers(0, 2**32),
)
def test_everybody_is_served_and_reads_nothing_but_the_own_prefix(
    windows: tuple[int | None, ...],
    num_spare_blocks: int,
    max_num_seqs: int,
    chunk_size: int,
    num_requests: int,
    seed: int,
) -> None:
    load = Load(random.Random(seed), windows, num_spare_blocks, max_num_seqs, chunk_size)
    for _ in range(num_requests):
        load.arrive()
        for _ in range(load.rng.randint(0, 6)):
            load.step()
    for _ in range(3000):
        if load.step() is None:
            break
    assert load.lengths == {}
    assert load.blocks.num_free_blocks == load.blocks.num_blocks


def test_a_thousand_requests_leave_every_block_free_and_nothing_behind() -> None:
    load = Load(random.Random(1), (None, 8, 8), 60, 6, 16)
    num_requests = 0
    while num_requests < 1000:
        load.arrive()
        num_requests += 1
        load.texts = load.texts[-20:]
        for _ in range(load.rng.randint(0, 12)):
            load.step()
    while load.step() is not None:
        pass
    cache = load.blocks._cache
    assert load.blocks.num_free_blocks == load.blocks.num_blocks
    assert load.blocks.num_cached_blocks == len(cache._place_of)
    assert len(cache._blocks_of) <= len(cache._place_of) <= load.blocks.num_blocks
    assert (load.scheduler.num_running, load.scheduler.num_waiting) == (0, 0)
    assert load.scheduler._waiting._of_user == {}
    assert load.num_cached_tokens > 5000
