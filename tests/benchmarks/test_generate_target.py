from itertools import pairwise

import pytest

from benchmarks.checkpoints import remove_stops
from benchmarks.generate_target import GenerateTarget
from benchmarks.targets import Chat
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> GenerateTarget:
    source = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    endless = tmp_path_factory.mktemp("endless")
    remove_stops(source, endless)
    return GenerateTarget(endless)


def make_chat(text: str) -> Chat:
    return Chat(({"role": "user", "content": text},), 5)


async def test_every_chat_of_a_batch_has_its_prompt_counted_and_its_tokens_timed(
    target: GenerateTarget,
) -> None:
    short, long = await target.send([make_chat("Hi"), make_chat("Hello")])
    assert (short.error, long.error) == (None, None)
    assert long.prompt_tokens - short.prompt_tokens == 3  # a token per byte; padding is not counted
    for record in (short, long):
        assert record.completion_tokens == 5
        times_s = (record.started_s, *record.chunk_times_s, record.ended_s)
        assert len(times_s) == 7
        assert all(earlier <= later for earlier, later in pairwise(times_s))
