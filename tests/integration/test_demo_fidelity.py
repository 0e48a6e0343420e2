"""The engine says exactly what transformers says, on real weights."""

import pytest
import torch

from gemma_serve.engine.engine import EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.generation import SamplingParams
from tests.gemma.harness import paged_logits
from tests.integration.fidelity import (
    Prompt,
    complete_greedily,
    english_prompts,
    generate_greedily,
    log_spaced_lengths,
    make_engine,
)

UNLIMITED = 4096
FEW_LENGTHS = (5, 17, 60, 530)
"""One of them longer than the window of 512."""

WINDOW = 512
VERY_LONG = 20_000

Reference = tuple[list[Prompt], list[Prompt]]


@pytest.fixture(scope="module")
def demo() -> LoadedGemma:
    return load_gemma(ModelConfig(model="demo", dtype="float32"))


@pytest.fixture(scope="module")
def few(demo: LoadedGemma) -> Reference:
    """A few prompts, and what transformers says after each."""
    prompts = english_prompts(demo.tokenizer, FEW_LENGTHS)
    return prompts, generate_greedily(demo, prompts)


@pytest.fixture(scope="module")
def around_the_window(demo: LoadedGemma) -> Reference:
    """Prompts whose answers cross the window's edge, or began well beyond it."""
    prompts = english_prompts(demo.tokenizer, (WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW))
    return prompts, generate_greedily(demo, prompts)


@pytest.fixture(scope="module")
def fifty(demo: LoadedGemma) -> Reference:
    """Fifty prompts of 5 to 3,000 tokens, and what transformers says after each."""
    prompts = english_prompts(demo.tokenizer, log_spaced_lengths(50, 5, 3000))
    return prompts, generate_greedily(demo, prompts)


@pytest.mark.parametrize("chunk_size", [64, UNLIMITED])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_greedy_tokens_equal_those_of_generate(
    demo: LoadedGemma, few: Reference, chunk_size: int, together: bool
) -> None:
    prompts, expected = few
    engine = make_engine(demo, chunk_size=chunk_size)
    assert complete_greedily(engine, prompts, together=together) == expected


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_the_smallest_chunks_change_nothing(
    demo: LoadedGemma, few: Reference, chunk_size: int
) -> None:
    """maxtext#2179, with real weights."""
    prompts, expected = few[0][:3], few[1][:3]
    engine = make_engine(demo, chunk_size=chunk_size)
    assert complete_greedily(engine, prompts, together=True) == expected


def test_greedy_tokens_around_the_window_equal_those_of_generate(
    demo: LoadedGemma, around_the_window: Reference
) -> None:
    """sglang#4807 and transformers#41184, with real weights."""
    prompts, expected = around_the_window
    engine = make_engine(demo, chunk_size=500)
    assert complete_greedily(engine, prompts, together=True) == expected


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 7, 64, UNLIMITED])
def test_chunks_around_the_window_change_nothing(
    demo: LoadedGemma, around_the_window: Reference, chunk_size: int
) -> None:
    """maxtext#2179, with real weights."""
    prompts, expected = around_the_window
    engine = make_engine(demo, chunk_size=chunk_size)
    assert complete_greedily(engine, prompts, together=True) == expected


@pytest.mark.slow
def test_greedy_tokens_after_twenty_thousand_equal_those_of_generate(demo: LoadedGemma) -> None:
    """mlx-vlm#1709, with real weights."""
    prompts = english_prompts(demo.tokenizer, [VERY_LONG])
    engine = make_engine(demo, chunk_size=2000, max_model_len=VERY_LONG + 100)
    assert complete_greedily(engine, prompts, together=True) == generate_greedily(demo, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 7, 64, UNLIMITED])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_fifty_prompts_equal_those_of_generate(
    demo: LoadedGemma, fifty: Reference, chunk_size: int, together: bool
) -> None:
    prompts, expected = fifty
    engine = make_engine(demo, chunk_size=chunk_size)
    assert complete_greedily(engine, prompts, together=together) == expected


def test_bfloat16_logits_are_as_close_to_float32_as_transformers_own(demo: LoadedGemma) -> None:
    half = load_gemma(ModelConfig(model="demo", dtype="bfloat16"))
    (prompt,) = english_prompts(demo.tokenizer, [300])
    input_ids = torch.tensor([prompt])
    with torch.inference_mode():
        demo.model.set_attn_implementation("sdpa")
        half.model.set_attn_implementation("sdpa")
        exact = demo.model(input_ids, logits_to_keep=1).logits[0, -1]
        theirs = half.model(input_ids, logits_to_keep=1).logits[0, -1].float()
    inputs = PromptInputs(prompt)
    (ours,) = paged_logits(half, [inputs], chunk_size=64, attention=SdpaAttention)
    assert (ours[-1].float() - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_log_likelihoods_are_those_of_transformers(demo: LoadedGemma) -> None:
    """What lm-eval adds up, for a prompt in one chunk and in several."""
    (prompt,) = english_prompts(demo.tokenizer, [40])
    demo.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logprobs = demo.model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
    expected = logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for chunk_size in (16, UNLIMITED):
        engine = make_engine(demo, chunk_size=chunk_size)
        engine.add(EngineRequest(key=0, prompt=PromptInputs(prompt), sampling=sampling))
        told = [d for _ in range(3) for output in engine.step() for d in output.deltas]
        scores = [position.chosen.logprob for position in told[0].prompt_logprobs]
        assert scores == pytest.approx(expected.tolist(), abs=1e-4)
