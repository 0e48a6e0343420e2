"""The kinds of quantised weights, what each needs, and whether this machine has it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch

from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.placement import ComputeCapability, Placement

INT4_GROUP_SIZE: Final = 32
"""Weights that share a scale: as many as in the ``q4_0`` that Google's QAT checkpoints were trained
for."""
_TINYGEMM_COLUMNS: Final = 1024  # torchao pads the input features to a multiple of it
_NF4_BLOCK_SIZE: Final = 64  # bitsandbytes' default; each block has a float32 scale

InstalledVersion = Callable[[str], str | None]
"""The version of a package, or ``None``."""


def _one_byte(out_features: int, in_features: int) -> int:
    return out_features * (in_features + 4)  # and a scale per row


def _nf4(out_features: int, in_features: int) -> int:
    return out_features * in_features // 2 + out_features * in_features // _NF4_BLOCK_SIZE * 4


def _tinygemm(out_features: int, in_features: int) -> int:
    padded = -(-in_features // _TINYGEMM_COLUMNS) * _TINYGEMM_COLUMNS
    return out_features * (padded // 2 + padded // INT4_GROUP_SIZE * 4)  # scale and zero: bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to store the decoder layers' matrices."""

    name: Quantization
    package: str | None
    """To install; ``None``: torch alone suffices."""
    min_version: str = "0"
    lowest_capability: ComputeCapability | None
    """Of every GPU; ``None``: any GPU, and the CPU."""
    only_bfloat16: bool
    """Whether its kernels multiply bfloat16 alone."""
    num_bytes: Callable[[int, int], int]
    """Of a matrix of ``(out_features, in_features)``, scales included."""


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind(
            name="bitsandbytes-8bit",
            package="bitsandbytes",
            min_version="0.49",
            lowest_capability=None,
            only_bfloat16=False,
            num_bytes=_one_byte,
        ),
        Kind(
            name="bitsandbytes-4bit",
            package="bitsandbytes",
            min_version="0.49",
            lowest_capability=None,
            only_bfloat16=False,
            num_bytes=_nf4,
        ),
        Kind(
            name="torchao-int8",
            package="torchao",
            min_version="0.17",
            lowest_capability=None,
            only_bfloat16=False,
            num_bytes=_one_byte,
        ),
        Kind(
            name="torchao-int4",
            package="torchao",
            min_version="0.17",
            lowest_capability=(8, 0),  # tinygemm's tensor cores
            only_bfloat16=True,
            num_bytes=_tinygemm,
        ),
        Kind(
            name="fp8",
            package=None,
            lowest_capability=(8, 9),  # Ada, Hopper, Blackwell
            only_bfloat16=True,
            num_bytes=_one_byte,
        ),
    )
}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_kind(
    quantization: Quantization,
    placement: Placement,
    *,
    installed: InstalledVersion = installed_version,
) -> None:
    """Raise ``ConfigurationError``, with what would do, unless this machine can compute with it.

    ``installed``: another look at the installed packages, for tests.
    """
    if quantization == "none":
        return
    kind = KINDS[quantization]
    if lack := _lack_of_device(kind, placement):
        possible = [k.name for k in KINDS.values() if not _lack_of_device(k, placement)]
        raise ConfigurationError(
            f"quantization: {quantization} {lack}: use one of {', '.join(possible)} here, or leave "
            "it out"
        )
    if lack := _lack_of_package(kind, installed):
        raise ConfigurationError(
            f"quantization: {quantization} {lack}: pip install 'gemma-serve[quantization]'"
        )


def _lack_of_device(kind: Kind, placement: Placement) -> str | None:
    if kind.lowest_capability is not None:
        wanted = f"needs GPUs of compute capability {_joined(kind.lowest_capability)} or later"
        if not placement.capabilities:
            return f"{wanted}, and the model runs on the CPU"
        lowest = min(placement.capabilities)
        if lowest < kind.lowest_capability:
            return f"{wanted}, and one has {_joined(lowest)}"
    if kind.only_bfloat16 and placement.dtype != torch.bfloat16:
        found = str(placement.dtype).removeprefix("torch.")
        return f"computes in bfloat16, and dtype is {found}"
    return None


def _lack_of_package(kind: Kind, installed: InstalledVersion) -> str | None:
    if kind.package is None:
        return None
    found = installed(kind.package)
    if found is None:
        return f"needs the package {kind.package}"
    if _numbers(found) < _numbers(kind.min_version):
        return f"needs {kind.package} {kind.min_version} or later, and {found} is installed"
    return None


def _joined(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version such as ``0.50.2`` or ``1.0rc1``, its first two."""
    parts = version.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
