"""Which attention a machine gets: the fastest that is there and computes what it should."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Final

import torch

from gemma_serve.engine.config import AttentionSetting
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import DeviceBackend
from gemma_serve.gemma.attention.native import NativeAttention, missing_for_native
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.attention.sdpa import SdpaAttention
from gemma_serve.gemma.attention.trial import difference_from_reference, trial_len
from gemma_serve.gemma.attention.varlen import VarlenAttention, installed_varlen_attn
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.launching import Kernels, lack_of_build_tools
from gemma_serve.gemma.quantization.fp8 import FP8

logger = logging.getLogger(__name__)

_GPU_ORDER: Final[tuple[AttentionSetting, ...]] = ("triton", "varlen", "sdpa")
_CPU_ORDER: Final[tuple[AttentionSetting, ...]] = ("native", "sdpa")

_MAX_DIFFERENCE: Final = 0.1
"""Of outputs of about 1. bfloat16 rounds by hundredths; a wrong mask is off by about as much as
the outputs are."""


@dataclass(frozen=True, slots=True)
class CacheAttention:
    """Attention over one cache."""

    begin: AttentionFactory
    backend: DeviceBackend | None = None
    """Where there is one, decode steps can be recorded with it."""


@dataclass(frozen=True, slots=True)
class SelectedAttention:
    """What makes attention for a trial's cache, then for the one that is served from."""

    over: Callable[[KVCache], CacheAttention]
    kernels: Kernels = "torch"
    """Who computes what else stands between the matrix products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeeds:
    """What the model and the largest step need."""

    layout: CacheLayout
    num_heads: int
    """Of queries."""
    dtype: torch.dtype
    """Of what is computed; the cache may store another."""
    block_size: int
    max_num_seqs: int
    max_model_len: int


def select_attention(setting: AttentionSetting, needs: AttentionNeeds) -> SelectedAttention:
    """What ``setting`` names, or the first that works here.

    Raises ``ConfigurationError`` if what it names does not.
    """
    if setting != "auto":
        if obstacle := _obstacle(setting, needs):
            raise ConfigurationError(f"attention: {setting} does not work here: {obstacle}")
        logger.info("attention: %s, as configured", setting)
        return _selected(setting, needs)
    on_gpu = needs.layout.plane_devices[0].type == "cuda"
    *candidates, last_resort = _GPU_ORDER if on_gpu else _CPU_ORDER
    obstacles = []
    for candidate in candidates:
        obstacle = _obstacle(candidate, needs)
        if obstacle is None:
            logger.info("attention: %s", candidate)
            return _selected(candidate, needs)
        logger.info("attention: not %s: %s", candidate, obstacle)
        obstacles.append(f"not {candidate}: {obstacle}")
    logger.warning("attention: %s, which is slower; %s", last_resort, "; ".join(obstacles))
    return _selected(last_resort, needs)


def _selected(name: AttentionSetting, needs: AttentionNeeds) -> SelectedAttention:
    kernels: Kernels = name if name in ("triton", "native") else "torch"
    return SelectedAttention(partial(_make, name, needs), kernels)


def _make(name: AttentionSetting, needs: AttentionNeeds, cache: KVCache) -> CacheAttention:
    match name:
        case "reference":
            return CacheAttention(ReferenceAttention)
        case "triton":
            # Not everybody has Triton.
            from gemma_serve.gemma.attention.triton_attention import TritonBackend

            backend = TritonBackend(cache, _tables(cache, needs), needs.num_heads, needs.dtype)
            return CacheAttention(backend.begin, backend)
        case "varlen":
            varlen_attn = installed_varlen_attn()
            assert varlen_attn is not None  # _missing looked for it
            return CacheAttention(partial(VarlenAttention, varlen_attn, _tables(cache, needs)))
        case "native":
            return CacheAttention(partial(NativeAttention, _tables(cache, needs)))
        case _:
            return CacheAttention(SdpaAttention)


def _tables(cache: KVCache, needs: AttentionNeeds) -> BlockTables:
    return BlockTables(cache, num_seats=needs.max_num_seqs, max_model_len=needs.max_model_len)


def _obstacle(name: AttentionSetting, needs: AttentionNeeds) -> str | None:
    """Why this attention cannot be used here; ``None`` if it can."""
    missing = _missing(name, needs.layout)
    if missing is not None or name not in ("triton", "varlen", "native"):
        return missing
    on_trial = replace(needs, max_num_seqs=8, max_model_len=trial_len(needs.layout))
    try:
        difference = difference_from_reference(
            lambda cache: _make(name, on_trial, cache).begin,
            needs.layout,
            num_heads=needs.num_heads,
            dtype=needs.dtype,
            block_size=needs.block_size,
        )
    except Exception as error:
        # Compilers and drivers raise what they like, and another kind of attention may work.
        logger.debug("attention: %s failed its trial", name, exc_info=True)
        lack = lack_of_build_tools() if name == "triton" else None
        return f"{type(error).__name__}: {error}" if lack is None else f"it needs {lack}"
    if not difference <= _MAX_DIFFERENCE:  # NaN is none either
        return f"its results differ from the reference by {difference:.3g}"
    return None


def _missing(name: AttentionSetting, layout: CacheLayout) -> str | None:
    on_gpu = layout.plane_devices[0].type == "cuda"
    head_dim = layout.head_dim
    match name:
        case "varlen" | "native" if layout.dtype == FP8:
            return "it does not read kv_cache_dtype: fp8"
        case "native":
            return missing_for_native(layout)
        case "triton" if find_spec("triton") is None:
            return "the package triton is not installed"
        case "triton" if on_gpu and layout.dtype == FP8 and not _has_float8(layout):
            return "it reads kv_cache_dtype: fp8 on compute capability 8.9 and later"
        case "triton" if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a GPU, or TRITON_INTERPRET=1 to try it out slowly"
        case "triton" if head_dim < 16 or head_dim & (head_dim - 1):
            return f"it needs heads of 16, 32, 64 and so on numbers, and these have {head_dim}"
        case "varlen" if installed_varlen_attn() is None:
            return f"torch {torch.__version__} has no varlen_attn with block tables"
        case "varlen" if not on_gpu:
            return "it needs a GPU"
        case "varlen" if layout.dtype == torch.float32:
            return "it needs bfloat16"
        case _:
            return None


def _has_float8(layout: CacheLayout) -> bool:
    return torch.cuda.get_device_capability(layout.plane_devices[0]) >= (8, 9)  # Ada
