"""Which model to load, and where."""

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model as the operator names it."""

    model: str = "demo"
    """``demo``, ``demo-vision``, ``dummy:<size>``, a local folder or GGUF file, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: DType = "auto"
    """``auto`` is bfloat16: Gemma 3's activations overflow float16."""
    device: Device = "auto"
    """``auto`` is CUDA where there is a GPU. All visible GPUs share the layers."""
