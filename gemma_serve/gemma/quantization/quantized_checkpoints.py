"""Checkpoints that are quantised already; transformers loads them as their own files say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from gemma_serve.errors import CheckpointError, ConfigurationError
from gemma_serve.gemma.checkpoints import read_json
from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.dummy import Gemma3Model

_FLOAT16_METHODS: Final = ("awq",)
"""Methods whose GPU kernels compute in float16; transformers turns bfloat16 into it for them."""


def quantization_method(folder: Path, name: str) -> str | None:
    """How the checkpoint in ``folder``, which messages call ``name``, is quantised, if it is."""
    config = read_json(folder / "config.json", name)
    quantization = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    return None if quantization is None else _method(quantization)


def _method(quantization: dict[str, Any]) -> str:
    method = quantization.get("quant_method") or "an unnamed method"
    for bits in ("8bit", "4bit"):
        if quantization.get(f"load_in_{bits}"):
            return f"bitsandbytes_{bits}"
    return str(method)


def require_loadable(method: str | None, name: str, quantization: Quantization) -> None:
    """Raise ``ConfigurationError`` if a checkpoint of this ``method`` cannot be served."""
    if method is None:
        return
    if method in _FLOAT16_METHODS:
        raise ConfigurationError(
            f"model: {name} is quantised with {method}, whose kernels compute in float16: Gemma "
            "3's activations overflow it and its answers come out empty. Use the bfloat16 "
            "checkpoint, with quantization: torchao-int4 or bitsandbytes-4bit for as little memory"
        )
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = sorted(set(AUTO_QUANTIZATION_CONFIG_MAPPING) - set(_FLOAT16_METHODS))
        raise CheckpointError(
            f"model: {name} is quantised with {method}, which transformers does not know; it knows "
            f"{', '.join(known)}"
        )
    if quantization != "none":
        raise ConfigurationError(
            f"quantization: {name} is already quantised with {method}, so {quantization} cannot be "
            "applied: leave it out, or use the bfloat16 checkpoint"
        )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what transformers says about a method that this machine lacks into a refusal."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"model: {name} cannot be loaded here: {error}") from error


def require_no_float16(model: Gemma3Model, name: str) -> None:
    """Raise ``CheckpointError`` if loading has put a part of ``model`` into float16 after all."""
    for module, norm in model.named_modules():
        weight = getattr(norm, "weight", None)
        if "norm" in module and weight is not None and weight.dtype == torch.float16:
            raise CheckpointError(
                f"model: {name} computes in float16 ({module}), which Gemma 3's activations "
                "overflow: use another checkpoint"
            )
