"""What every launch of a Triton kernel needs."""

from contextlib import AbstractContextManager, nullcontext

import torch


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def padded(size: int) -> int:
    """The next power of two: all that Triton's ranges can count to."""
    return 1 << (size - 1).bit_length()
