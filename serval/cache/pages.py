"""Storage on huge pages: one address translation covers 2 MiB instead of 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

SMALLEST = 4 << 20  # bytes; smaller storage stays in the processor's caches anyway


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C library's madvise, None where there is none (or no huge pages)."""
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function if hasattr(mmap, "MADV_HUGEPAGE") else None


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask the system to put a fresh, untouched CPU tensor on huge pages; returns the tensor.

    A system that refuses keeps small pages: slower, otherwise the same.
    """
    advise = _madvise()
    if tensor.device.type != "cpu" or tensor.nbytes < SMALLEST or advise is None:
        return tensor
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return tensor
