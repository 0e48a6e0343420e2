"""Which model to load, and where."""

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal[
    "none", "bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "torchao-int4", "fp8"
]


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
    quantization: Quantization = "none"
    """How the decoder layers' matrices are stored; ``none`` is as the checkpoint has them."""
