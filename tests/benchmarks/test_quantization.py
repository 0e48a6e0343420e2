import math

import pytest
import torch

from benchmarks.quantization import TEXT, perplexity_of
from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.engine_builder import build_engine
from tests.gemma.harness import loaded, prompt, transformers_logits
from tests.tiny import tiny_text_model


def test_perplexity_is_that_of_transformers() -> None:
    inputs = prompt(60)
    logprobs = transformers_logits(tiny_text_model(), inputs).log_softmax(-1)
    chosen = logprobs[:-1].gather(1, torch.tensor(inputs.token_ids[1:])[:, None])
    expected = math.exp(-float(chosen.mean()))
    config = EngineConfig(max_model_len=64, prefill_chunk_size=16)
    engine = build_engine(loaded(tiny_text_model()), config)
    perplexity, tokens_per_s = perplexity_of(engine, inputs.token_ids)
    assert perplexity == pytest.approx(expected, rel=1e-3)
    assert tokens_per_s > 0


def test_text_is_ascii_so_that_every_tokenizer_reads_the_same() -> None:
    assert TEXT.read_text(encoding="utf-8").isascii()
