"""One error for what torch says in several ways."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

_OTHER_WORDS: Final = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # by the driver, as when a kernel is loaded
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise ``MemoryError`` where a device or the machine runs out of memory. Also a decorator.

    Those who must not import torch can then tell it from a broken model.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _says_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise


def _says_out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _OTHER_WORDS)
