"""Where a compression keeps its finished parts until the checkpoint is complete.

A hidden directory beside the output, `.NAME.partial`, with one safetensors file per part, the
calibration samples after the last one and `state.json`, which names what is valid. A run with the
same key goes on where an interrupted one stopped, whatever interrupted it; another key starts anew.
Each file is complete before `state.json` names it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serval.compress.blockwise import Part, PartReport, Samples
from serval.compress.scheme import WeightScheme
from serval.compress.storage import Storage
from serval.errors import CheckpointError
from serval.models.checkpoint.safetensors_file import (
    StoredTensor,
    TensorToWrite,
    read_header,
    read_tensor,
    write_file,
)

_STATE = "state.json"


class Workspace:
    """The partial directory of `out`; a context manager that locks it. key: changes with anything
    that changes the result. Raises CheckpointError when another process works on the same output,
    or the directory cannot be written."""

    def __init__(self, out: Path, key: str) -> None:
        out = out.expanduser().resolve()
        self.path = out.parent / f".{out.name}.partial"
        self.key = key
        self.parts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Workspace:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            raise CheckpointError(
                f"another process is compressing to the same directory ({self.path} is locked); "
                "wait for it, or choose another --out"
            ) from error
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an interruption what is finished stays for the next run; nothing does otherwise."""
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if not (interrupted and self.parts):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)

    def _read(self) -> None:
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            found = state["parts"] if state["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            found = {}
        self.parts = found
        named = {entry["file"] for entry in found.values()} | {_STATE, "lock"}
        if found:
            named.add(_samples_file(len(found)))
        for leftover in self.path.iterdir():
            if leftover.name not in named:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def add(
        self,
        part: Part,
        tensors: Iterable[TensorToWrite],
        report: PartReport,
        storages: dict[str, Storage],
        samples: Samples,
    ) -> None:
        """Keep a finished part: its tensors, what to say of it, the storage of its quantised
        matrices and the samples after it. Raises CheckpointError when the disk is full."""
        number = len(self.parts) + 1
        file = f"part-{number:05d}.safetensors"
        try:
            write_file(self.path / file, tensors)
            write_file(self.path / _samples_file(number), _sample_tensors(samples))
            self.parts[part.name] = {
                "file": file,
                "report": asdict(report),
                "storages": {name: _to_json(storage) for name, storage in storages.items()},
            }
            self._write_state()
            (self.path / _samples_file(number - 1)).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.path}: {error.strerror or error}; free some space or "
                "choose another --out. Nothing was left behind"
            ) from error

    def _write_state(self) -> None:
        temporary = self.path / f"{_STATE}.new"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"key": self.key, "parts": self.parts}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / _STATE)

    def report(self, part: Part) -> PartReport | None:
        """Of a finished part."""
        entry = self.parts.get(part.name)
        return None if entry is None else PartReport(**entry["report"])

    def storages(self, part: Part) -> dict[str, Storage]:
        """Of a finished part's matrices."""
        return {
            name: _from_json(values) for name, values in self.parts[part.name]["storages"].items()
        }

    def samples(self) -> Samples:
        """Those after the last finished part."""
        stored = read_header(self.path / _samples_file(len(self.parts)))
        made = Samples()
        for kind in ("float", "quantized"):
            count = sum(name.startswith(f"{kind}.") for name in stored)
            if count:
                setattr(made, kind, [read_tensor(stored[f"{kind}.{i}"]) for i in range(count)])
        return made

    def tensors(self) -> list[TensorToWrite]:
        """The stored tensors of all finished parts, in order, read again when they are written."""
        return [
            TensorToWrite(stored.name, stored.dtype, stored.shape, _later(stored))
            for entry in self.parts.values()
            for stored in sorted(
                read_header(self.path / entry["file"]).values(), key=lambda tensor: tensor.begin
            )
        ]


def _later(stored: StoredTensor) -> Any:
    return lambda: read_tensor(stored)


def _samples_file(number: int) -> str:
    return f"samples-{number:05d}.safetensors"


def _sample_tensors(samples: Samples) -> list[TensorToWrite]:
    made = []
    for kind, tensors in (("float", samples.float), ("quantized", samples.quantized)):
        for index, tensor in enumerate(tensors or []):
            made.append(_tensor(f"{kind}.{index}", tensor))
    return made


def _tensor(name: str, tensor: Tensor) -> TensorToWrite:
    return TensorToWrite(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _to_json(storage: Storage) -> dict[str, Any]:
    return {**asdict(storage), "scale_dtype": str(storage.scale_dtype).removeprefix("torch.")}


def _from_json(values: dict[str, Any]) -> Storage:
    dtype = getattr(torch, values["scale_dtype"])
    return Storage(**{**values, "scheme": WeightScheme(**values["scheme"]), "scale_dtype": dtype})
