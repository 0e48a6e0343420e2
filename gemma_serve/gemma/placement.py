"""On which devices, and in which number format, a model runs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import Device, DType, ModelConfig

logger = logging.getLogger(__name__)

ComputeCapability = tuple[int, int]
"""``(major, minor)`` of an NVIDIA GPU."""
_BFLOAT16_CAPABILITY: Final = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True)
class Placement:
    """Several devices are GPUs that share the layers."""

    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    capabilities: tuple[ComputeCapability, ...] = ()
    """Per GPU; none on the CPU."""


def place(config: ModelConfig) -> Placement:
    """Choose for this machine. Raises ``ConfigurationError`` where it lacks what is asked."""
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    devices = choose_devices(config.device, num_gpus=len(capabilities))
    used = tuple(capabilities) if devices[0].type == "cuda" else ()
    return Placement(devices, choose_dtype(config.dtype, used), used)


def choose_devices(setting: Device, *, num_gpus: int) -> tuple[torch.device, ...]:
    """All visible GPUs, or the CPU."""
    if setting == "cuda" and num_gpus == 0:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise ConfigurationError(
            f"device: cuda was asked for, but torch {torch.__version__} (built with {built}) sees "
            "no GPU: check the driver, CUDA_VISIBLE_DEVICES and num_gpus, or set device: cpu"
        )
    if setting == "cpu" or num_gpus == 0:
        return (torch.device("cpu"),)
    return tuple(torch.device("cuda", index) for index in range(num_gpus))


def choose_dtype(setting: DType, capabilities: Sequence[ComputeCapability]) -> torch.dtype:
    """``auto`` is bfloat16 wherever every GPU has it. ``capabilities``: empty on a CPU.

    Never float16: Gemma 3's activations overflow it, and the answers are empty.
    """
    if setting == "float32":
        return torch.float32
    if all(capability >= _BFLOAT16_CAPABILITY for capability in capabilities):
        return torch.bfloat16
    lowest = ".".join(map(str, min(capabilities)))
    reason = f"a GPU of compute capability {lowest} has no bfloat16 (8.0 and later have)"
    if setting == "bfloat16":
        raise ConfigurationError(f"dtype: {reason}: set dtype: float32")
    logger.warning("%s: using float32, which takes twice the memory", reason)
    return torch.float32
