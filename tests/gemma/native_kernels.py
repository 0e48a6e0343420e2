"""What tests of our kernels for CPUs need of the machine."""

from typing import Final

import pytest
import torch

from gemma_serve.gemma.native.build import BuildError
from gemma_serve.gemma.native.library import native_kernels


def _obstacle() -> str | None:
    try:
        native_kernels()
    except BuildError as error:
        return str(error)
    return None


_OBSTACLE: Final = _obstacle()
_HAS_TILES: Final = (
    _OBSTACLE is None
    and native_kernels().multiplies
    and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
)

needs_kernels: Final = pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))
needs_tiles: Final = pytest.mark.skipif(
    not _HAS_TILES, reason="there is neither AMX nor AVX-512 BF16, or no compiler"
)
