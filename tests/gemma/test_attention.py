"""Every backend gives the logits of transformers' own forward with its own masks.

The mistakes that others made here are in ``test_known_bugs.py``.
"""

import pytest
import torch

from gemma_serve.gemma.attention.native import NativeAttention
from gemma_serve.gemma.attention.paged import PagedAttention
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from tests.gemma.harness import loaded, paged_logits, prompt, transformers_logits
from tests.gemma.native_kernels import needs_kernels
from tests.tiny import tiny_text_model, tiny_vision_model

BACKENDS = [
    ReferenceAttention,
    SdpaAttention,
    pytest.param(NativeAttention, marks=needs_kernels),
]
WINDOW = 16

pytestmark = pytest.mark.parametrize("attention", BACKENDS)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_text_of_mixed_lengths_in_chunks(
    attention: type[PagedAttention], chunk_size: int, num_kv_heads: int
) -> None:
    model = tiny_text_model(sliding_window=WINDOW, num_kv_heads=num_kv_heads)
    lengths = [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5, 100]
    prompts = [prompt(n, seed=n) for n in lengths]
    results = paged_logits(loaded(model), prompts, chunk_size=chunk_size, attention=attention)
    for inputs, logits in zip(prompts, results, strict=True):
        torch.testing.assert_close(logits, transformers_logits(model, inputs), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("num_tokens", "images"),
    [
        (30, [(10, 14)]),
        (30, [(0, 4)]),
        (30, [(26, 30)]),
        (30, [(1, 5), (6, 10)]),
        (60, [(0, 4), (20, 24), (50, 54)]),
        (30, []),
    ],
    ids=["inside", "first", "last", "almost adjacent", "several", "none"],
)
@pytest.mark.parametrize("chunk_size", [4, 9, 10_000])
def test_images_wherever_they_stand(
    attention: type[PagedAttention], num_tokens: int, images: list[tuple[int, int]], chunk_size: int
) -> None:
    model = tiny_vision_model(sliding_window=WINDOW)
    inputs = prompt(num_tokens, images=images)
    (logits,) = paged_logits(loaded(model), [inputs], chunk_size=chunk_size, attention=attention)
    torch.testing.assert_close(logits, transformers_logits(model, inputs), atol=2e-4, rtol=1e-4)


def test_text_and_images_of_several_requests_in_one_step(attention: type[PagedAttention]) -> None:
    model = tiny_vision_model(sliding_window=WINDOW)
    prompts = [
        prompt(40, images=[(3, 7), (30, 34)], seed=1),
        prompt(1, seed=2),
        prompt(21, seed=3),
        prompt(24, images=[(20, 24)], seed=4),
    ]
    results = paged_logits(loaded(model), prompts, chunk_size=11, attention=attention)
    for inputs, logits in zip(prompts, results, strict=True):
        torch.testing.assert_close(logits, transformers_logits(model, inputs), atol=2e-4, rtol=1e-4)


def test_sequences_of_very_different_lengths_decode_together(
    attention: type[PagedAttention],
) -> None:
    """One long chat and many short ones, in the same steps."""
    model = tiny_text_model(sliding_window=WINDOW)
    prompts = [prompt(n, seed=n) for n in (4, 700, 5, 300, 40)]
    results = paged_logits(
        loaded(model), prompts, chunk_size=10_000, attention=attention, num_decoded=3
    )
    for inputs, logits in zip(prompts, results, strict=True):
        torch.testing.assert_close(logits, transformers_logits(model, inputs), atol=2e-4, rtol=1e-4)


def test_bfloat16_stays_close_to_float32(attention: type[PagedAttention]) -> None:
    inputs = prompt(60, images=[(5, 9)])
    exact = transformers_logits(tiny_vision_model(), inputs)
    half = tiny_vision_model(dtype=torch.bfloat16)
    theirs = transformers_logits(half, inputs).float()
    (logits,) = paged_logits(loaded(half), [inputs], chunk_size=16, attention=attention)
    assert (logits.float() - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_fp8_cache_stays_close_to_one_of_what_the_model_computes(
    attention: type[PagedAttention],
) -> None:
    if not attention.reads_fp8:
        pytest.skip("is refused with such a cache")
    gemma = loaded(tiny_vision_model(sliding_window=WINDOW))
    prompts = [prompt(40, images=[(3, 7)], seed=1), prompt(70, seed=2)]
    exact, found = (
        paged_logits(
            gemma, prompts, chunk_size=11, attention=attention, num_decoded=5, cache_dtype=dtype
        )
        for dtype in (None, torch.float8_e4m3fn)
    )
    for theirs, ours in zip(exact, found, strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert 0 < error < 0.15
