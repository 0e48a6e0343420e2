"""Pages of 2 MiB for memory that is read again in every step."""

import ctypes
import mmap
from functools import cache

from torch import Tensor


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back ``tensor``, which nothing has touched yet, by large pages.

    With those of 4 KiB a CPU spends a tenth of a step on finding them. It is advice: where it is
    not taken, nothing changes.
    """
    first_page = -(-tensor.data_ptr() // mmap.PAGESIZE)
    num_pages = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first_page
    if num_pages > 0:
        start, size = first_page * mmap.PAGESIZE, num_pages * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
