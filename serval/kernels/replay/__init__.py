"""Record the kernel calls of a computation once, then make them again without Python.

What CUDA graphs are to GPUs: between the kernels of a decode step Python takes longer than the
small kernels themselves. `record` runs a function as usual and writes down every C++ kernel it
calls, with its arguments; `Tape.run` makes the same calls on the same memory. Whoever records keeps
alive what was read, weights included, and puts new values of the inputs there before each run.

A computation can be replayed when all its arithmetic happens in recordable kernels (those with a
`PACKED` form in C++), Python decides by shapes only, and memory comes from `torch.empty`. Anything
else that PyTorch is asked to compute while recording, is noticed, and there is no tape; the
function's result is right all the same.
"""

from __future__ import annotations

import ctypes
import math
import struct
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serval.kernels import jit

_REPLAY = jit.Kernel("replay", "replay", "pl")
_ALLOCATIONS = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"})
_READS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__array__, Tensor.__bool__})


class Pool:
    """Memory for what a recorded computation allocates. A block is free again when the last tensor
    on it is gone, and what a tape used is free for the next recording: of several tapes that share
    a pool one runs at a time, and its result lasts until the next run or recording."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free: dict[int, list[int]] = {}  # bytes -> addresses

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(block.nbytes for block in self._blocks)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on a block of its own."""
        size = max(256, 1 << (max(1, shape.numel() * dtype.itemsize) - 1).bit_length())
        free = self._free.setdefault(size, [])
        if not free:
            block = torch.empty(size, dtype=torch.uint8)
            self._blocks.append(block)
            free.append(block.data_ptr())
        address = free.pop()
        memory = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(memory, free.append, address).atexit = False
        return self.tensor(memory, shape, dtype)

    def tensor(self, memory: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor on ctypes memory of this pool, which it keeps alive."""
        memory.pool = self
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


class Tape:
    """Recorded calls, and the tensor they leave their result in.

    calls: (kernel, address of its packed form, arguments as 64-bit fields) in order.
    """

    def __init__(
        self,
        calls: list[tuple[jit.Kernel, int, list[int]]],
        kept: list[Any],
        pool: Pool,
        result: Tensor,
    ) -> None:
        self.calls = calls
        self._kept = kept
        memory = (ctypes.c_uint8 * max(1, result.nbytes)).from_address(result.data_ptr())
        self.result = pool.tensor(memory, result.shape, result.dtype)  # its block is free again
        flat = [field for _, _, fields in calls for field in fields]
        self._fields = (ctypes.c_int64 * len(flat))(*flat)
        place, records = ctypes.addressof(self._fields), []
        for _, function, fields in calls:
            records += [function, place]
            place += 8 * len(fields)
        self._records = (ctypes.c_int64 * len(records))(*records)
        self._address = ctypes.addressof(self._records)
        self._replay = _REPLAY.get()

    def run(self) -> Tensor | None:
        """Make the calls. Returns the result, overwritten by the next run of any tape of the pool;
        None when a kernel refused its arguments (the ordinary way says why)."""
        assert self._replay is not None
        return None if self._replay(self._address, len(self.calls)) else self.result


class Recorder(TorchDispatchMode):
    """Writes down kernel calls; see `record`.

    obstacle: the first thing that cannot be replayed, in words; None while there is none.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.calls: list[tuple[jit.Kernel, int, list[int]]] = []
        self.kept: list[Any] = []
        self.obstacle: str | None = None

    def refuse(self, why: str) -> None:
        """There will be no tape."""
        self.obstacle = self.obstacle or why

    def watch(self, kernel: jit.Kernel, function: jit.Function) -> jit.Function:
        """`function` of `kernel`, which also writes its calls down."""
        address = kernel.packed()
        letters = kernel.signature.replace(" ", "")

        def call(*arguments: Any) -> int:
            status = function(*arguments)
            if address is None:
                self.refuse(f"kernel {kernel.name} has no packed form")
            elif status:
                self.refuse(f"kernel {kernel.name} refused its arguments")
            else:
                fields = [_field(letter, a) for letter, a in zip(letters, arguments, strict=True)]
                self.calls.append((kernel, address, fields))
            return status

        return call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _ALLOCATIONS and func.namespace == "aten":
            if out.device.type == "cpu" and out.is_contiguous():
                return self.pool.empty(out.shape, out.dtype)
            self.refuse(f"{func} is not contiguous memory of the CPU")
        elif not _is_view(func, (args, kwargs), out):
            self.refuse(f"PyTorch computes {func}")
        return out


class _Reads(TorchFunctionMode):
    """Notices Python looking at values, which a replay would not do again."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        if func in _READS:
            self.recorder.refuse(f"Python reads values by {func.__name__}")
        return func(*args, **(kwargs or {}))


def _is_view(func: Any, inputs: Any, outputs: Any) -> bool:
    """Whether an op computed nothing: all it returned lies in the memory of its inputs."""
    if func._schema.is_mutable:
        return False
    returned = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    given = {x.untyped_storage().data_ptr() for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    return bool(returned) and all(x.untyped_storage().data_ptr() in given for x in returned)


def _field(letter: str, value: Any) -> int:
    """A ctypes argument as the 64-bit field that `Packed` in simd.h reads."""
    if value is None:
        return 0
    if letter == "f":
        return struct.unpack("i", struct.pack("f", value))[0]
    return int(value)


def record(pool: Pool, compute: Callable[[], Tensor]) -> tuple[Tensor, Tape | str]:
    """Run `compute` (no gradients, on the CPU, in this thread) and record it.

    Returns its result, valid like that of `Tape.run`, and the tape, or in words why there is none.
    """
    if _REPLAY.get() is None:
        return compute(), "there are no compiled kernels"
    recorder = Recorder(pool)
    with recorder, _Reads(recorder), jit.recording(recorder):
        result = compute()
    if recorder.obstacle is None and not result.is_contiguous():
        recorder.refuse("the result is not contiguous")
    if recorder.obstacle is not None:
        return result, recorder.obstacle
    tape = Tape(recorder.calls, recorder.kept, pool, result)
    return tape.result, tape
