"""A second model guesses: over real models, too, the text is the one without."""

from dataclasses import replace
from pathlib import Path

import pytest

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.draft_model import load_draft
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.generation import GenerationRequest, SamplingParams, TextPrompt
from tests.gemma.harness import loaded
from tests.gemma.test_speculation import CONFIG, SAMPLINGS, completions, let_drafts_be_free
from tests.tiny import VOCAB_SIZE, save_tiny_checkpoint, tiny_text_model, tiny_vision_model

DRAFTED = replace(CONFIG, speculation="off", draft_model="a smaller one")


def drafted_engine(model: Gemma3Model, draft: Gemma3Model) -> Engine:
    engine = build_engine(loaded(model), DRAFTED, draft=loaded(draft))
    let_drafts_be_free(engine)
    return engine


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_tokens_with_a_draft_model_are_those_without(sampling: SamplingParams) -> None:
    engine = drafted_engine(tiny_vision_model(), tiny_text_model(seed=1, num_layers=2))
    expected = completions(engine, sampling, speculation=False)
    assert engine.stats.num_drafted_tokens == 0
    found = completions(engine, sampling, speculation=True)
    assert {place: delta.token_ids for place, delta in found.items()} == {
        place: delta.token_ids for place, delta in expected.items()
    }
    assert engine.stats.num_drafted_tokens > 4
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_model_that_is_its_own_draft_is_always_right(kind: str) -> None:
    engine = drafted_engine(tiny_vision_model(), tiny_vision_model())
    completions(engine, replace(SAMPLINGS[kind], allowed_token_ids=None), speculation=True)
    assert engine.stats.num_accepted_tokens == engine.stats.num_drafted_tokens > 20


async def test_generator_loads_both_models_and_tells_how_well_one_guesses(tmp_path: Path) -> None:
    served, draft = (save_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    generator = GemmaGenerator.load(
        ModelConfig(model=str(served), dtype="float32"),
        EngineConfig(draft_model=str(draft), max_model_len=64, kv_cache_memory_bytes=2**22),
    )
    request = GenerationRequest(
        request_id="r",
        prompt=TextPrompt("abc"),
        sampling=SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    )
    async with await generator.generate(request) as stream:
        num_tokens = sum([len(delta.token_ids) async for deltas in stream for delta in deltas])
    load = await generator.measure_load()
    generator.close()
    assert num_tokens == 20
    assert 0 <= load.num_accepted_tokens <= load.num_drafted_tokens
    assert load.num_drafted_tokens > 0


def test_both_caches_share_the_memory_by_what_a_chat_takes() -> None:
    alone = build_engine(loaded(tiny_text_model()), CONFIG)
    drafted = drafted_engine(tiny_text_model(), tiny_text_model(seed=1))
    assert drafted.stats.num_blocks == alone.stats.num_blocks // 2


def test_model_of_another_vocabulary_is_refused() -> None:
    stranger = synthetic_tokenizer(vocab_size=VOCAB_SIZE, boi_token_id=500, eoi_token_id=510)
    draft = replace(loaded(tiny_text_model()), name="other", tokenizer=stranger)
    with pytest.raises(
        ConfigurationError,
        match=r"^draft_model: other has not the vocabulary of tiny: token 500 is b'' to it, not b",
    ):
        build_engine(loaded(tiny_text_model()), DRAFTED, draft=draft)


def test_model_that_cannot_be_loaded_is_named_by_its_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"^draft_model: model: 'gpt' is not known"):
        load_draft("gpt", ModelConfig())


def test_drafts_of_a_model_need_room_in_a_step() -> None:
    config = EngineConfig(draft_model="a smaller one", max_num_seqs=2)
    assert config.max_sampled_rows == 1 + config.num_speculative_tokens
    with pytest.raises(ConfigurationError, match="must be less than prefill_chunk_size, 8"):
        EngineConfig(draft_model="a smaller one", prefill_chunk_size=8)
