"""What every launch of a Triton kernel needs."""

import os
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from shutil import which
from typing import Literal

import torch

Kernels = Literal["torch", "triton", "native"]
"""Who computes what stands between the matrix products: torch, or kernels of ours, which do at once
what torch needs several for."""


def lack_of_build_tools() -> str | None:
    """What Triton, which builds a small C extension before its first launch, does not find here."""
    lacks = []
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        lacks.append("a C compiler (Debian, Ubuntu: apt install gcc libc6-dev)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks.append("Python's headers (Debian, Ubuntu: apt install python3-dev)")
    return " and ".join(lacks) or None


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def padded(size: int) -> int:
    """The next power of two: all that Triton's ranges can count to."""
    return 1 << (size - 1).bit_length()
