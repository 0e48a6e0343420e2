"""Mistakes that other servers shipped with Gemma 3, each named after the first report of it.

Where a mistake is not one of the model's computation, its number is in the docstring of the test
that would find it here.
"""

import importlib
import pkgutil
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma import attention as attention_package
from gemma_serve.gemma.attention.native import NativeAttention
from gemma_serve.gemma.attention.paged import PagedAttention
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.attention.varlen import VarlenAttention
from gemma_serve.gemma.dummy import dummy_config, empty_model
from tests.gemma.harness import (
    last_transformers_logits,
    loaded,
    paged_logits,
    prompt,
    transformers_logits,
)
from tests.gemma.native_kernels import needs_kernels
from tests.tiny import tiny_text_model, tiny_vision_model

BACKENDS = [ReferenceAttention, SdpaAttention, NativeAttention]
WINDOW = 16
ALL_AT_ONCE = 10_000

each_backend = pytest.mark.parametrize(
    "attention",
    [
        pytest.param(backend, marks=needs_kernels) if backend is NativeAttention else backend
        for backend in BACKENDS
    ],
)


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def divergence(logits: Tensor, expected: Tensor) -> float:
    """The largest Kullback-Leibler divergence at any position, in nats."""
    log_probs, log_expected = logits.log_softmax(-1), expected.log_softmax(-1)
    return float((log_expected.exp() * (log_expected - log_probs)).sum(-1).max())


def blind_to_what_follows(inputs: PromptInputs) -> Tensor:
    """The logits of transformers with the same images under a purely causal mask."""
    model = tiny_vision_model(sliding_window=WINDOW)
    forward = model.forward

    def forward_without_token_types(**inputs: Tensor) -> object:
        return forward(**{**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])})

    model.forward = forward_without_token_types
    return transformers_logits(model, inputs)


@each_backend
@pytest.mark.parametrize("chunk_size", [4, 13, ALL_AT_ONCE])
def test_vllm_14660_image_tokens_are_not_causal(
    attention: type[PagedAttention], chunk_size: int
) -> None:
    """For eight months (mended by vllm#27938, #30386). vllm#40106 draws the line at 0.0004."""
    inputs = prompt(60, images=[(5, 9), (30, 34)])
    model = tiny_vision_model(sliding_window=WINDOW)
    (logits,) = paged_logits(loaded(model), [inputs], chunk_size=chunk_size, attention=attention)
    expected = transformers_logits(model, inputs)
    assert divergence(logits, expected) < 0.0004
    assert divergence(blind_to_what_follows(inputs), expected) > 0.03


def test_vllm_46754_every_backend_is_compared_with_transformers() -> None:
    """A backend that cannot show images to themselves said that it could."""
    for module in pkgutil.iter_modules(
        attention_package.__path__, attention_package.__name__ + "."
    ):
        if "triton" not in module.name or find_spec("triton") is not None:
            importlib.import_module(module.name)
    kinds = {*PagedAttention.__subclasses__(), *SdpaAttention.__subclasses__()}
    ours = {kind for kind in kinds if kind.__module__.startswith("gemma_serve.")}
    # Those of GPUs alone are compared with the reference, in test_device_attention.
    assert ours - {VarlenAttention} == set(BACKENDS)


@each_backend
@pytest.mark.parametrize("window", [1, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("chunk_size", [16, 17, ALL_AT_ONCE])
def test_vllm_47217_image_longer_than_the_window_is_seen_whole(
    attention: type[PagedAttention], window: int, chunk_size: int
) -> None:
    """And longer than a block, first, in the middle and last, and with no more than one between."""
    model = tiny_vision_model(sliding_window=window, mm_tokens_per_image=16)
    inputs = prompt(56, images=[(0, 16), (17, 33), (40, 56)])
    (logits,) = paged_logits(loaded(model), [inputs], chunk_size=chunk_size, attention=attention)
    assert_same(logits, transformers_logits(model, inputs))


@each_backend
@pytest.mark.parametrize("num_tokens", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("chunk_size", [1, 5, ALL_AT_ONCE])
def test_transformers_41184_window_is_not_off_by_one(
    attention: type[PagedAttention], num_tokens: int, chunk_size: int
) -> None:
    """Also NeMo Speech#9672. A window of one more or less is another model."""
    inputs = prompt(num_tokens)
    logits, longer, shorter = [
        paged_logits(
            loaded(tiny_text_model(sliding_window=window)),
            [inputs],
            chunk_size=chunk_size,
            attention=attention,
        )[0]
        for window in (WINDOW, WINDOW + 1, WINDOW - 1)
    ]
    assert_same(logits, transformers_logits(tiny_text_model(sliding_window=WINDOW), inputs))
    assert torch.allclose(logits, longer, atol=1e-4) == (num_tokens <= WINDOW)
    assert torch.allclose(logits, shorter, atol=1e-4) == (num_tokens < WINDOW)


@each_backend
def test_sglang_4807_window_holds_in_every_layer_far_beyond_it(
    attention: type[PagedAttention],
) -> None:
    """Garbage after 1 to 2 k tokens; mistral.rs#1248, #2094 and litgpt#2153 too.

    With real weights: ``integration/test_demo_fidelity.py``.
    """
    inputs = prompt(20 * WINDOW)
    model = tiny_text_model(sliding_window=WINDOW)
    (logits,) = paged_logits(loaded(model), [inputs], chunk_size=64, attention=attention)
    assert_same(logits, transformers_logits(model, inputs))
    everywhere = transformers_logits(tiny_text_model(sliding_window=10_000), inputs)
    assert divergence(everywhere[WINDOW:], logits[WINDOW:]) > 0.03


@each_backend
@pytest.mark.parametrize("num_decoded", [0, 3])
def test_vllm_14881_window_holds_for_requests_that_share_a_prefix(
    attention: type[PagedAttention], num_decoded: int
) -> None:
    """The path for shared prefixes forgot the window."""
    model = tiny_text_model(sliding_window=WINDOW)
    prefix = prompt(5 * WINDOW).token_ids
    prompts = [PromptInputs((*prefix, *prompt(3 + i, seed=i + 1).token_ids)) for i in range(6)]
    results = paged_logits(
        loaded(model), prompts, chunk_size=50, attention=attention, num_decoded=num_decoded
    )
    for inputs, logits in zip(prompts, results, strict=True):
        assert_same(logits, transformers_logits(model, inputs))


@each_backend
@pytest.mark.parametrize("num_tokens", [200, 1500])
def test_mlx_vlm_1709_rope_is_stretched_in_full_layers_only(
    attention: type[PagedAttention], num_tokens: int
) -> None:
    """Nearly right below 200 tokens, broken at 3 k; llama.cpp#14367, ferrox#39, lmdeploy#3772 too.

    For 20 k: ``integration/test_demo_fidelity.py``.
    """
    model = tiny_text_model(sliding_window=WINDOW)
    inputs = prompt(num_tokens)
    (logits,) = paged_logits(
        loaded(model), [inputs], chunk_size=500, attention=attention, block_size=16
    )
    assert_same(logits, transformers_logits(model, inputs))
    rotary = model.get_decoder().rotary_emb
    rotary.full_attention_inv_freq.mul_(8)
    assert divergence(transformers_logits(model, inputs), logits) > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("window", [WINDOW, 512])
def test_mlx_vlm_1709_rope_is_stretched_at_twenty_thousand_tokens(window: int) -> None:
    model = tiny_text_model(sliding_window=window)
    inputs = prompt(20_000)
    (logits,) = paged_logits(
        loaded(model), [inputs], chunk_size=500, attention=SdpaAttention, block_size=16
    )
    assert_same(logits[-1], last_transformers_logits(model, inputs, chunk_size=1000))


def test_27b_attention_scale_is_not_that_of_its_head_dim() -> None:
    """1/sqrt(168), of ``query_pre_attn_scalar``; with 1/sqrt(128) its answers only get worse."""
    for size, scalar in (("27b", 168), ("12b", 256), ("270m", 256)):
        config = dummy_config(size)
        model = empty_model(config, dtype=torch.bfloat16, device=torch.device("meta"))
        scales = {layer.self_attn.scaling for layer in model.get_decoder().layers}
        assert scales == {scalar**-0.5}, size


@each_backend
def test_attention_scale_of_the_model_reaches_the_kernel(attention: type[PagedAttention]) -> None:
    """The tiny model's is 1/sqrt(24), its head_dim 16."""
    model = tiny_text_model(sliding_window=WINDOW)
    inputs = prompt(30)
    (logits,) = paged_logits(loaded(model), [inputs], chunk_size=7, attention=attention)
    assert_same(logits, transformers_logits(model, inputs))
    for layer in model.get_decoder().layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    assert divergence(transformers_logits(model, inputs), logits) > 0.01


@each_backend
def test_maxtext_2179_logits_do_not_depend_on_how_the_prompt_was_cut(
    attention: type[PagedAttention],
) -> None:
    """With real weights: ``integration/test_demo_fidelity.py``."""
    gemma = loaded(tiny_vision_model(sliding_window=WINDOW))
    inputs = prompt(150, images=[(20, 24), (63, 67), (140, 144)])
    whole, *cut = [
        paged_logits(gemma, [inputs], chunk_size=size, attention=attention, block_size=16)[0]
        for size in (ALL_AT_ONCE, 4, 7, 64)
    ]
    for logits in cut:
        assert_same(logits, whole)
        assert torch.equal(logits.argmax(-1), whole.argmax(-1))


@each_backend
@pytest.mark.parametrize("num_decoded", [0, 3])
def test_transformers_45491_no_nan_where_lengths_differ_much(
    attention: type[PagedAttention], num_decoded: int
) -> None:
    """5 and 2,000 tokens together: padding, of which a window sees nothing else."""
    model = tiny_text_model(sliding_window=WINDOW)
    prompts = [prompt(num_tokens, seed=num_tokens) for num_tokens in (5, 2000, 30)]
    results = paged_logits(
        loaded(model),
        prompts,
        chunk_size=ALL_AT_ONCE,
        attention=attention,
        block_size=16,
        num_decoded=num_decoded,
    )
    for inputs, logits in zip(prompts, results, strict=True):
        assert logits.isfinite().all()
        assert_same(logits, transformers_logits(model, inputs))
