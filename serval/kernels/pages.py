"""Storage on huge pages: one address translation covers 2 MiB instead of 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a huge page
SMALLEST = PAGE  # bytes


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


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros; a large one on the CPU asks the system for huge pages.

    Its memory is untouched until written to, and goes back to the system when it is freed. A system
    that refuses keeps small pages: slower, otherwise the same.
    """
    advise = _madvise()
    count = math.prod(shape)
    size = count * dtype.itemsize
    if torch.device(device).type != "cpu" or size < SMALLEST or advise is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    begin = -whole.data_ptr() % PAGE
    advise(whole.data_ptr() + begin, size // PAGE * PAGE, mmap.MADV_HUGEPAGE)
    return whole[begin : begin + size].view(dtype).view(shape)
