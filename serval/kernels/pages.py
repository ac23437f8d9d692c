"""Storage on huge pages: one address translation covers 2 MiB instead of 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a huge page
SMALLEST = 1 << 16  # bytes of a tensor worth it
CHUNK = 8 * PAGE  # bytes of memory that small tensors share
LINE = 4096  # bytes: where small tensors begin


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


class _Chunk(threading.local):
    """Where this thread's next small tensors lie: fresh, untouched memory on huge pages."""

    memory: Tensor | None = None
    used = 0


_chunk = _Chunk()


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros; from `SMALLEST` bytes on, on the CPU, it asks the system for huge pages.

    Tensors smaller than a page lie side by side in one piece of memory. Memory is untouched until
    written to, and goes back to the system when the last tensor on it is freed. A system that
    refuses keeps small pages: slower, otherwise the same.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < SMALLEST or _madvise() is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    if size >= PAGE:
        return _fresh(size).view(dtype).view(shape)
    if _chunk.memory is None or _chunk.used + size > CHUNK:
        _chunk.memory, _chunk.used = _fresh(CHUNK), 0
    piece = _chunk.memory[_chunk.used : _chunk.used + size]
    _chunk.used += -(-size // LINE) * LINE
    return piece.view(dtype).view(shape)


def _fresh(size: int) -> Tensor:
    """Bytes of a mapping of their own, from the start of a huge page."""
    advise = _madvise()
    assert advise is not None
    memory = mmap.mmap(-1, size + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    begin = -whole.data_ptr() % PAGE
    advise(whole.data_ptr() + begin, size // PAGE * PAGE, mmap.MADV_HUGEPAGE)
    return whole[begin : begin + size]
