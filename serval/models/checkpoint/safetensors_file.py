"""Reading and writing safetensors files in pieces.

The `safetensors` package maps a whole file into memory and writes from a dict that holds every
tensor. Serval fills parameters in place, a block at a time, and writes tensors one by one, so that
neither loading nor saving needs a second copy of the model, and so that an error can name its
tensor. The format: 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serval.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
BLOCK_BYTES = 8 << 20  # read and checked while hot in cache

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, dtype, shape and the absolute byte range of its data."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, checked before any of them is read.

    Raises CheckpointError when the file is truncated or its header is malformed: wrong length, not
    JSON, a name given twice, an unknown dtype, byte ranges that overlap, leave holes or lie outside
    the file, or that disagree with the shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(path, f"has {size} bytes, too few for a header; download it again")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise _bad(
                    path,
                    f"claims a header of {length} bytes in a file of {size}; it is truncated or "
                    "not a safetensors file",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    header = _parse(path, raw)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, value, start, size) for name, value in header.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise _bad(path, f"names {key!r} twice in its header")
            result[key] = value
        return result

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(path, "has a header that is not a JSON object")
    return header


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> StoredTensor:
    def natural(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    if not isinstance(value, dict):
        raise _bad(path, f"describes tensor {name!r} by {type(value).__name__}, not an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise _bad(path, f"stores tensor {name!r} as dtype {dtype!r}; supported: {known}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(natural(n) for n in shape):
        raise _bad(path, f"gives tensor {name!r} the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(natural(n) for n in offsets):
        raise _bad(path, f"gives tensor {name!r} the byte range {offsets!r}")
    begin, end = offsets
    expected = prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise _bad(
            path,
            f"gives tensor {name!r} {end - begin} bytes; shape {shape} of {dtype} needs {expected}",
        )
    if start + end > size:
        raise _bad(
            path,
            f"ends before tensor {name!r} does (needs {start + end} bytes, has {size}); "
            "it is truncated: copy or download it again",
        )
    return StoredTensor(name, path, DTYPES[dtype], tuple(shape), start + begin, start + end)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    position, previous = start, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            what = "overlaps" if tensor.begin < position else "leaves a hole after"
            raise _bad(path, f"is malformed: tensor {tensor.name!r} {what} {previous!r}")
        position, previous = tensor.end, tensor.name
    if position != size:
        raise _bad(path, f"has {size - position} bytes that belong to no tensor")


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_into(stored: StoredTensor, target: Tensor, *, descriptor: int, check: bool = True) -> None:
    """Fill `target`, any strided view with as many elements as `stored`, in row order.

    Data is read block by block: straight into place when dtype, layout and device allow, otherwise
    through a scratch block that converts. Raises CheckpointError naming the tensor when the file
    ends early, or when `check` finds NaN or infinity.
    """
    direct = target.dtype == stored.dtype and target.is_contiguous() and target.device.type == "cpu"
    if target.dim() == 0:
        target = target.view(1)
    if direct:
        target = target.view(-1)
    rows = target.shape[0] if target.numel() else 0
    if not rows:
        return
    row_items = target.numel() // rows
    step = max(1, BLOCK_BYTES // (row_items * stored.dtype.itemsize))
    scratch = None if direct else torch.empty(min(step, rows) * row_items, dtype=stored.dtype)
    position = stored.begin
    for first in range(0, rows, step):
        part = target[first : first + step]
        block = part if scratch is None else scratch[: part.numel()]
        _read_exactly(descriptor, tensor_bytes(block), position, stored)
        position += block.numel() * stored.dtype.itemsize
        if check and stored.dtype.is_floating_point:
            _check_finite(stored, block)
        if scratch is not None:
            part.copy_(block.view(part.shape))


def read_tensor(stored: StoredTensor) -> Tensor:
    """One stored tensor as it is, on the CPU. Raises CheckpointError as `read_into`."""
    made = torch.empty(stored.shape, dtype=stored.dtype)
    descriptor = os.open(stored.path, os.O_RDONLY)
    try:
        read_into(stored, made, descriptor=descriptor, check=False)
    finally:
        os.close(descriptor)
    return made


def _read_exactly(descriptor: int, into: memoryview, position: int, stored: StoredTensor) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], position + done)
        if not count:
            raise _bad(stored.path, f"ended while tensor {stored.name!r} was read; is it changing?")
        done += count


def _check_finite(stored: StoredTensor, block: Tensor) -> None:
    if stored.dtype.itemsize == 1:
        block = block.to(torch.float32)
    low, high = block.aminmax()  # one pass, no temporary; NaN wins over every number
    if not (torch.isfinite(low) and torch.isfinite(high)):
        kind = "NaN" if torch.isnan(low) else "infinity"
        raise CheckpointError(
            f"tensor {stored.name!r} in {stored.path} holds {kind}; the checkpoint is damaged "
            "(in Python, check_finite=False loads it all the same)"
        )


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file to be written; `make` returns its data when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Iterable[TensorToWrite]) -> None:
    """Write one safetensors file and flush it to the disk. Raises OSError as the system does."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # data starts on a multiple of 8
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for tensor in tensors:
            file.write(tensor_bytes(_converted(tensor)))
        file.flush()
        os.fsync(file.fileno())


def _converted(tensor: TensorToWrite) -> Tensor:
    source = tensor.make().detach()
    data = source.to("cpu", tensor.dtype).contiguous()
    if tensor.dtype == torch.float16 and source.dtype != torch.float16 and data.numel():
        largest = source.aminmax()
        if torch.stack(largest).isfinite().all() and not data.isfinite().all():
            raise CheckpointError(
                f"tensor {tensor.name!r} has values up to {torch.stack(largest).abs().max():.3g}, "
                "beyond float16; save as bfloat16 or float32"
            )
    return data
