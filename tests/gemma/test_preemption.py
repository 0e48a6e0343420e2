"""A sequence that loses its blocks and is computed again says what it would have said."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import pytest

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.model_runner import StepUnderWay
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.generation import SamplingParams
from tests.gemma.harness import loaded, prompt
from tests.tiny import tiny_vision_model

BLOCK_SIZE = 4
CHUNK_SIZE = 8
MAX_MODEL_LEN = 96
BYTES_PER_BLOCK = 2 * 2 * 16 * 4 * BLOCK_SIZE
"""Keys and values of two heads of 16 float32 numbers, in one layer."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step computed of one sequence."""

    request_key: int
    start: int
    end: int
    num_known: int
    """Tokens of prompt and completion at that time."""


class WatchedEngine:
    """Completes prompts with ``num_blocks`` blocks and keeps what each step computed."""

    def __init__(self, model: Gemma3Model, *, num_blocks: int) -> None:
        config = EngineConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4,
            prefill_chunk_size=CHUNK_SIZE,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=num_blocks * BYTES_PER_BLOCK,
            enable_prefix_cache=False,  # else nothing may be left to compute again
        )
        self.chunks: list[Chunk] = []
        self._engine: Engine = build_engine(loaded(model), config)
        self._runner = self._engine._runner
        self._engine._runner = self

    def begin(self, batch: ScheduledBatch) -> StepUnderWay:
        self.chunks += [
            Chunk(s.sequence.request_key, s.start, s.end, len(s.sequence.token_ids))
            for s in batch.scheduled
        ]
        return self._runner.begin(batch)

    def complete(
        self, prompts: Seq[PromptInputs], sampling: SamplingParams
    ) -> dict[int, tuple[int, ...]]:
        """The tokens after each prompt, all computed together."""
        completions: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(prompts)), ())
        for key, inputs in enumerate(prompts):
            assert self._engine.add(EngineRequest(key=key, prompt=inputs, sampling=sampling)) == []
        while self._engine.has_work:
            for output in self._engine.step():
                assert output.error is None
                for delta in output.deltas:
                    completions[output.key] += delta.token_ids
        stats = self._engine.stats
        assert stats.num_free_blocks == stats.num_blocks
        return completions

    def preempted_in(self) -> set[str]:
        """The phases in which a sequence had to go back."""
        reached: dict[int, Chunk] = {}
        phases = set()
        for chunk in self.chunks:
            before = reached.get(chunk.request_key)
            if before is not None and chunk.start < before.end:
                phases.add("decode" if before.end == before.num_known else "prefill")
            reached[chunk.request_key] = chunk
        return phases


@dataclass(frozen=True, slots=True)
class Crowd:
    """Prompts that do not fit into ``num_blocks`` with their answers, and who suffers by that."""

    prompts: tuple[PromptInputs, ...]
    num_blocks: int
    max_tokens: int
    preempted_in: str


CROWDS = {
    "text, decoding": Crowd(tuple(prompt(14, seed=i) for i in range(3)), 80, 70, "decode"),
    "images, decoding": Crowd(
        tuple(prompt(14, images=[(3, 7), (8, 12)], seed=i) for i in range(3)),
        80,
        70,
        "decode",
    ),
    "text, prefill": Crowd(
        (*(prompt(8, seed=i) for i in range(3)), prompt(60, seed=3)), 112, 30, "prefill"
    ),
    "images, prefill": Crowd(
        (
            *(prompt(8, images=[(2, 6)], seed=i) for i in range(3)),
            prompt(60, images=[(0, 4), (6, 10), (30, 34), (56, 60)], seed=3),
        ),
        112,
        30,
        "prefill",
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS.keys())
def test_preempted_sequences_say_what_undisturbed_ones_say(
    crowd: Crowd, temperature: float
) -> None:
    """Recomputing by another cut must change nothing: neither keys, nor images, nor dice."""
    model = tiny_vision_model()
    sampling = SamplingParams(
        temperature=temperature, seed=5, max_tokens=crowd.max_tokens, ignore_eos=True
    )
    undisturbed = WatchedEngine(model, num_blocks=1000)
    expected = undisturbed.complete(crowd.prompts, sampling)
    assert undisturbed.preempted_in() == set()
    crowded = WatchedEngine(model, num_blocks=crowd.num_blocks)
    assert crowded.complete(crowd.prompts, sampling) == expected
    assert crowd.preempted_in in crowded.preempted_in()
