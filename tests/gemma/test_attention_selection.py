"""Which attention a machine gets, and what is said about it."""

import logging
from collections.abc import Sequence
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from gemma_serve.engine.config import AttentionSetting
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.paged import PagedAttention
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.attention.selection import AttentionNeeds, select_attention
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.attention.trial import difference_from_reference
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache, LayerPlace
from gemma_serve.gemma.native.build import BuildError
from gemma_serve.gemma.quantization.fp8 import FP8
from tests.gemma.native_kernels import needs_kernels


def layout(
    num_kv_heads: int = 1,
    head_dim: int = 16,
    *,
    window: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> CacheLayout:
    """Of one full layer and three with a window."""
    return CacheLayout(
        windows=(None, window, window, window),
        places=tuple(LayerPlace(group, 0) for group in range(4)),
        plane_devices=(device or torch.device("cpu"),),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )


def needs(layout: CacheLayout) -> AttentionNeeds:
    return AttentionNeeds(
        layout=layout,
        num_heads=2,
        dtype=torch.float32,
        block_size=4,
        max_num_seqs=4,
        max_model_len=64,
    )


def selected(setting: AttentionSetting, of_layout: CacheLayout) -> AttentionFactory:
    chosen = select_attention(setting, needs(of_layout))
    return chosen.over(KVCache(of_layout, num_blocks=1, block_size=4)).begin


@needs_kernels
def test_a_cpu_gets_our_kernels(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = select_attention("auto", needs(layout()))
    assert chosen.kernels == "native"
    assert caplog.messages == ["attention: native"]


def test_a_cpu_without_a_compiler_gets_torchs_attention_and_is_told_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernels() -> NoReturn:
        raise BuildError("it needs a C++ compiler")

    monkeypatch.setattr("gemma_serve.gemma.attention.native.native_kernels", no_kernels)
    assert selected("auto", layout()) is SdpaAttention
    assert "not native: it needs a C++ compiler" in caplog.text


def test_attention_can_be_named() -> None:
    assert selected("reference", layout()) is ReferenceAttention
    assert selected("sdpa", layout()) is SdpaAttention


@pytest.mark.parametrize(
    ("setting", "head_dim", "obstacle"),
    [
        ("varlen", 16, "varlen does not work here: (it needs a GPU|torch .* has no varlen_attn)"),
        ("triton", 24, "triton does not work here: "),
    ],
)
def test_attention_that_cannot_work_is_refused_with_the_reason(
    setting: AttentionSetting, head_dim: int, obstacle: str
) -> None:
    with pytest.raises(ConfigurationError, match=obstacle):
        select_attention(setting, needs(layout(head_dim=head_dim)))


def test_a_cache_in_8_bits_is_refused_by_attention_that_does_not_read_it() -> None:
    with pytest.raises(ConfigurationError, match="varlen does not work here: it does not read kv"):
        select_attention("varlen", needs(layout(dtype=FP8)))


@pytest.mark.parametrize("stored", [torch.float32, FP8])
def test_triton_passes_its_trial_in_the_interpreter(stored: torch.dtype) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    small = layout(dtype=stored)
    chosen = select_attention("triton", needs(small))
    assert chosen.kernels == "triton"
    assert chosen.over(KVCache(small, num_blocks=1, block_size=4)).backend is not None


class IgnoringImages(ReferenceAttention):
    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        super().__init__(cache, [as_text(chunk) for chunk in chunks])


def as_text(chunk: Chunk) -> Chunk:
    return Chunk(chunk.row, chunk.start, chunk.end, (), chunk.blocks, chunk.blocks_id)


class IgnoringWindows(ReferenceAttention):
    def _window(self, layer: int) -> None:
        assert layer >= 0


class NoNumbers(ReferenceAttention):
    def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return super()._attend(layer, query, scale) * torch.nan


def difference(attention: type[PagedAttention]) -> float:
    return difference_from_reference(
        lambda _: attention, layout(), num_heads=2, dtype=torch.float32, block_size=4
    )


def test_a_trial_finds_what_is_wrong() -> None:
    assert difference(SdpaAttention) < 1e-5
    assert difference(IgnoringImages) > 0.5
    assert difference(IgnoringWindows) > 0.5
    assert not difference(NoNumbers) < 1e9
