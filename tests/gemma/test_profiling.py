"""The largest steps are what the scheduler could at most come to, and they run."""

import pytest
import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.model_runner import run_step
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.profiling import largest_steps, measure_gpus
from gemma_serve.gemma.token_feed import TokenFeed
from gemma_serve.generation import VisionInput
from tests.gemma.harness import loaded
from tests.tiny import IMAGE_SIZE, tiny_text_model, tiny_vision_model

CONFIG = EngineConfig(prefill_chunk_size=30, max_num_seqs=4, block_size=4)
WINDOWS = (None, 16, 16, 16, 16, 16)
VISION = VisionInput(view_size=IMAGE_SIZE, tokens_per_view=4)


def steps(
    config: EngineConfig = CONFIG, *, max_model_len: int = 100, vision: VisionInput | None = VISION
) -> list[ScheduledBatch]:
    return largest_steps(
        config, max_model_len=max_model_len, windows=WINDOWS, vocab_size=512, vision=vision
    )


def runner_over_one_block(model: Gemma3Model) -> GemmaModelRunner:
    device = model.get_input_embeddings().weight.device
    text_model = model.get_decoder()
    layout = CacheLayout.of(text_model.config, [device] * len(text_model.layers), model.dtype)
    sampler = Sampler(vocab_size=model.lm_head.out_features, forbidden_token_ids=(), device=device)
    cache = KVCache(layout, num_blocks=1, block_size=CONFIG.block_size)
    feed = TokenFeed(max_rows=16, device=device)
    return GemmaModelRunner(loaded(model), Decoder(model), cache, sampler, SdpaAttention, feed)


def test_all_sequences_decode_at_the_end_of_the_context_beside_the_last_chunk_of_a_prompt() -> None:
    text_step, image_step = steps()
    for step in (text_step, image_step):
        assert [(s.start, s.end) for s in step.scheduled] == [
            (97, 98),
            (96, 97),
            (95, 96),
            (69, 99),
        ]
        assert len(step.sampling) == 4


def test_one_step_has_as_many_images_as_a_chunk_holds_and_no_two_alike() -> None:
    text_step, image_step = steps()
    assert text_step.scheduled[-1].images == []
    images = image_step.scheduled[-1].images
    assert [image.start for image in images] == [69, 73, 77, 81, 85, 89, 93]
    assert len({image.digest for image in images}) == 7
    assert {len(image.view) for image in images} == {3 * IMAGE_SIZE**2}


def test_a_model_without_eyes_has_one_largest_step() -> None:
    assert len(steps(vision=None)) == 1


@pytest.mark.parametrize("max_num_seqs", [1, 2, 9, 20])
def test_drafts_are_sampled_by_no_more_sequences_than_there_may_be(max_num_seqs: int) -> None:
    """Whoever keeps a place for each sequence has no more."""
    config = EngineConfig(
        prefill_chunk_size=30, max_num_seqs=max_num_seqs, block_size=4, speculation="prompt_lookup"
    )
    step, _ = steps(config)
    assert len(step.scheduled) == max_num_seqs
    assert len(step.sampling_states) == max(9, max_num_seqs)
    chunk = step.scheduled[-1]
    assert (chunk.start, chunk.end, len(chunk.token_ids)) == (69, 99, 30)


@pytest.mark.parametrize(("max_model_len", "chunk"), [(20, (0, 19)), (2, (0, 1))])
def test_a_context_shorter_than_a_chunk_is_computed_whole(
    max_model_len: int, chunk: tuple[int, int]
) -> None:
    last = steps(max_model_len=max_model_len)[0].scheduled[-1]
    assert (last.start, last.end) == chunk


def test_one_sequence_alone_has_nobody_decode_beside_it() -> None:
    config = EngineConfig(prefill_chunk_size=30, max_num_seqs=1, block_size=4)
    assert len(steps(config)[0].scheduled) == 1


@pytest.mark.parametrize("max_model_len", [100, 3])
def test_the_largest_steps_run_over_a_cache_of_one_block(max_model_len: int) -> None:
    runner = runner_over_one_block(tiny_vision_model())
    for step in steps(max_model_len=max_model_len):
        sampled = run_step(runner, step)
        assert len(sampled) == 4
        assert all(s.token_id is not None and 0 <= s.token_id < 520 for s in sampled)


def test_the_largest_steps_of_a_text_model_run_too() -> None:
    (step,) = steps(vision=None)
    assert len(run_step(runner_over_one_block(tiny_text_model()), step)) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_asked_what_the_largest_steps_take() -> None:
    device = torch.device("cuda", 0)
    model = tiny_vision_model().to(device)
    before = torch.cuda.memory_allocated(device)
    use = measure_gpus(lambda: runner_over_one_block(model), steps(), [device])[device]
    # Of the logits alone there is a float32 copy, and one float64 of the weights of all tokens.
    assert use.step_bytes > 4 * 520 * (4 + 8)
    assert 0 < use.free_bytes <= torch.cuda.mem_get_info(device)[1]
    assert torch.cuda.memory_allocated(device) <= before + 64 * 1024**2  # libraries' workspaces
