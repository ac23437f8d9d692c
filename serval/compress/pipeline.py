"""`serval compress MODEL --weights METHOD --out DIR`: from a checkpoint to a compressed one."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from serval.compress.compressor import Progress
from serval.compress.registry import COMPRESSORS
from serval.errors import CheckpointError, ConfigError
from serval.models import checkpoint
from serval.models.checkpoint.files import TOKENIZER_FILES, list_tensors, locate
from serval.models.checkpoint.safetensors_file import StoredTensor
from serval.registry import resolve

_ALSO_COPIED = ("recipe.yaml",)  # tells which text the model was trained on, and which held out


@dataclass
class CompressOptions:
    """model: checkpoint directory or hub name. out: directory to write. weights: a name of
    `COMPRESSORS`. settings: fields of that method. force: replace a checkpoint at `out`."""

    model: str | Path
    out: str | Path
    weights: str = "int8"
    settings: dict[str, Any] = field(default_factory=dict)
    force: bool = False


@dataclass
class CompressResult:
    """What was written, and what it weighs. bytes: of all stored tensors, before and after.
    kept: checkpoint name of each module left in float -> why."""

    directory: Path
    weights: str
    bytes_before: int
    bytes_after: int
    quantised: list[str]
    kept: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "directory": str(self.directory)}


def run(options: CompressOptions, progress: Progress | None = None) -> CompressResult:
    """Load, quantise module by module, save. The peak is the source model plus one module.

    The output is complete or absent. Raises ConfigError for options that do not fit and
    CheckpointError naming a weight that is missing or not finite, or a full disk.
    """
    start = time.perf_counter()
    compressor = make_compressor(options.weights, options.settings)
    source, out = locate(options.model), Path(options.out)
    _check_output(source, out, options.force)
    stored = list_tensors(source)
    before = _stored_bytes(stored)
    decoder = checkpoint.load(source, dtype=_stored_dtype([t.dtype for t in stored.values()]))
    if decoder.quantization_config is not None:
        raise ConfigError(
            f"{source} is already quantised; compress the checkpoint it was made from instead"
        )
    report = compressor.compress(decoder, progress)
    if not report.quantised:
        raise ConfigError(
            f"no module of {source} would be quantised: all {len(report.kept)} were kept in float "
            f"({', '.join(sorted(set(report.kept.values())))}); keep fewer with --set ignore=[...]"
        )
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    checkpoint.save(decoder, out, tokenizer_dir=source if has_tokenizer else None)
    _copy_beside(source, out)
    return CompressResult(
        directory=out,
        weights=options.weights,
        bytes_before=before,
        bytes_after=_stored_bytes(list_tensors(out)),
        quantised=report.quantised,
        kept=report.kept,
        seconds=time.perf_counter() - start,
    )


def make_compressor(name: str, settings: dict[str, Any]) -> Any:
    """The compressor `name` with its fields set; raises ConfigError naming an unknown field, or
    one whose value has the wrong type."""
    kind = resolve(COMPRESSORS, name, "compressor")
    known = [f.name for f in fields(kind)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"compressor {name!r} has no setting {key!r}; it has: {', '.join(known) or 'none'}"
            )
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise ConfigError(
            f"setting {key!r} of compressor {name!r}: {wrong['msg']}, got {wrong['input']!r}"
        ) from error


def _check_output(source: Path, out: Path, force: bool) -> None:
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out {out} is the model itself; choose another directory")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(f"--out {out} is not empty; choose another directory, or pass --force")


def _copy_beside(source: Path, out: Path) -> None:
    for name in _ALSO_COPIED:
        if (source / name).is_file():
            try:
                shutil.copyfile(source / name, out / name)
            except OSError as error:
                (out / name).unlink(missing_ok=True)
                raise CheckpointError(
                    f"{out} is complete, but {name} could not be copied to it: {error.strerror}"
                ) from error


def _stored_bytes(stored: dict[str, StoredTensor]) -> int:
    return sum(tensor.end - tensor.begin for tensor in stored.values())


def _stored_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The floating dtype most tensors have: what the model computes in and scales are kept in."""
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1)
    if not counts:
        raise CheckpointError("the checkpoint has no floating-point weights to compress")
    return counts.most_common(1)[0][0]
