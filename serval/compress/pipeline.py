"""`serval compress MODEL --weights METHOD --out DIR`: from a checkpoint to a compressed one.

Blocks are read from the source one at a time and written when they are done, so memory holds one
block in float, its calibration statistics and the calibration samples, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import serval
from serval.compress.blockwise import Blockwise, Part, PartReport, Progress
from serval.compress.calibrate import Calibration
from serval.compress.compressed_tensors import quantization_config_of
from serval.compress.method import Method
from serval.compress.stores import CheckpointStore, MemoryStore, untie
from serval.compress.workspace import Workspace
from serval.errors import CheckpointError, ConfigError
from serval.models import checkpoint
from serval.models.checkpoint.files import TOKENIZER_FILES, list_tensors, locate
from serval.models.checkpoint.reading import OpenCheckpoint
from serval.models.checkpoint.safetensors_file import StoredTensor
from serval.models.checkpoint.writing import choose_family, repeated_tensors, write_checkpoint
from serval.models.decoder import Decoder

REPORT = "compression.json"  # beside the weights: how they were made
_ALSO_COPIED = ("recipe.yaml",)  # tells which text the model was trained on, and which held out

Note = Callable[[str], None]


@dataclass
class CompressOptions(Method):
    """model: checkpoint directory or hub name. out: directory to write. calibration: which tokens,
    for recipes that need any. force: replace a checkpoint at `out`."""

    model: str | Path
    out: str | Path
    calibration: Calibration = field(default_factory=Calibration, kw_only=True)
    force: bool = field(default=False, kw_only=True)


@dataclass
class Compression:
    """What became of a decoder's matrices, by their names in the checkpoint.

    quantised: its scheme. errors: |W - Q| / |W|. kept: why others stayed in float. fell_back: why
    some were not done as asked. plan: what the recipe decided. part_seconds: time by part.
    """

    quantised: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    fell_back: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    part_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: dict[str, PartReport]) -> Compression:
        made = cls(part_seconds={name: round(part.seconds, 2) for name, part in parts.items()})
        for part in parts.values():
            for key in ("quantised", "errors", "kept", "fell_back", "plan"):
                getattr(made, key).update(getattr(part, key))
        return made


@dataclass
class CompressResult(Compression):
    """What was written, and what it weighs. bytes: of all stored tensors, before and after."""

    directory: Path = Path()
    weights: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "directory": str(self.directory)}


def run(
    options: CompressOptions, progress: Progress | None = None, note: Note | None = None
) -> CompressResult:
    """Compress a checkpoint. note: is told a line per finished block.

    The output is complete or absent. A run that was interrupted (by Ctrl-C, or killed) goes on
    where it stopped when it is started again with the same options. Raises ConfigError for options
    that do not fit, DataError for calibration text that is missing or empty, CheckpointError naming
    a weight that is missing or not finite, or a full disk.
    """
    start = perf_counter()
    resolved = options.resolve()
    source, out = locate(options.model), Path(options.out)
    check_output(source, out, options.force)
    stored = list_tensors(source)
    dtype = stored_dtype([tensor.dtype for tensor in stored.values()])
    with OpenCheckpoint(source, dtype) as opened:
        decoder = opened.decoder.eval()
        if decoder.quantization_config is not None:
            raise ConfigError(
                f"{source} is already quantised; compress the checkpoint it was made from instead"
            )
        float_config = decoder.config
        if resolved.rotation is not None:
            untie(decoder, resolved.rotation.config(float_config))
        family = choose_family(decoder.config)
        work = Blockwise(
            decoder,
            resolved.recipe,
            resolved.schemes(decoder),
            dtype,
            lambda: options.calibration.tokens(float_config, source, lambda: _float_model(source)),
            resolved.integer_scale,
            resolved.rotation,
            resolved.format,
        )
        key = _key(options, stored, work.calibrates)
        with Workspace(out, key) as workspace:
            tell = None if note is None else _teller(note)
            parts = work.run(CheckpointStore(opened, workspace, dtype, tell), progress)
            decoder.quantization_config = quantization_config_of(decoder)
            tensors = workspace.tensors()
            tensors += repeated_tensors(decoder, family, tensors, dtype)
            result = CompressResult(
                **asdict(Compression.of(parts)),
                directory=out,
                weights=options.weights,
                bytes_before=stored_bytes(stored),
                bytes_after=sum(tensor.nbytes for tensor in tensors),
            )
            write_checkpoint(
                out,
                decoder,
                family,
                tensors,
                tokenizer_dir=source if has_tokenizer(source) else None,
                also=_also(source, options, result),
                staging_parent=workspace.path,
            )
    result.seconds = perf_counter() - start
    return result


def compress_decoder(
    decoder: Decoder,
    method: Method,
    tokens: Sequence[Tensor] | None = None,
    progress: Progress | None = None,
) -> Compression:
    """Compress a decoder in memory, in place. tokens: int64 [T] per calibration sample, for methods
    that need any (None: random ones). Its weights pass through float32 one block at a time; what
    stays in float keeps its dtype. Raises as `run`."""
    resolved = method.resolve()
    dtype = decoder.norm.weight.dtype
    if resolved.rotation is not None:
        untie(decoder, resolved.rotation.config(decoder.config))
    samples = list(tokens) if tokens is not None else None
    work = Blockwise(
        decoder,
        resolved.recipe,
        resolved.schemes(decoder),
        dtype,
        lambda: samples or Calibration("random").tokens(decoder.config, Path(), lambda: decoder),
        resolved.integer_scale,
        resolved.rotation,
        resolved.format,
    )
    made = Compression.of(work.run(MemoryStore(decoder, dtype), progress))
    decoder.quantization_config = quantization_config_of(decoder)
    return made


def _float_model(source: Path) -> Decoder:
    return checkpoint.load(source, dtype=torch.float32)


def _teller(note: Note) -> Callable[[Part, PartReport], None]:
    def tell(part: Part, report: PartReport) -> None:
        if report.quantised:
            kinds = Counter(report.quantised.values())
            counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            errors = list(report.errors.values())
            mean = f", mean error {sum(errors) / len(errors):.4f}" if errors else ""
            note(f"{part.name}: {report.seconds:.1f} s, {counted}{mean}")

    return tell


def check_output(source: Path, out: Path, force: bool) -> None:
    """Raises ConfigError when `out` must not be written."""
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out {out} is the model itself; choose another directory")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(f"--out {out} is not empty; choose another directory, or pass --force")


def _key(options: CompressOptions, stored: dict[str, StoredTensor], calibrates: bool) -> str:
    """A digest of everything that changes the result."""
    files = sorted({tensor.path for tensor in stored.values()})
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    chosen = {k: v for k, v in asdict(options).items() if k not in ("out", "force")}
    text = options.calibration.state() if calibrates else ""
    values = [serval.__version__, torch.get_num_threads(), chosen, states, text]
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


def has_tokenizer(source: Path) -> bool:
    """Whether a checkpoint directory holds a tokenizer."""
    return any((source / name).is_file() for name in TOKENIZER_FILES)


def _also(source: Path, options: CompressOptions, result: CompressResult) -> dict[str, bytes]:
    """More files for the output: how it was made, and what the source says of its training."""
    made = asdict(options)
    for key in ("model", "out", "force"):
        del made[key]
    report = {key: getattr(result, key) for key in ("quantised", "kept", "fell_back", "plan")}
    text = json.dumps({"method": made, **report}, indent=1, default=str)
    return {REPORT: text.encode() + b"\n", **copied_files(source)}


def copied_files(source: Path) -> dict[str, bytes]:
    """What the source says of its training, for the checkpoint that is made of it."""
    paths = [source / name for name in _ALSO_COPIED]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def stored_bytes(stored: dict[str, StoredTensor]) -> int:
    """Bytes of all stored tensors."""
    return sum(tensor.end - tensor.begin for tensor in stored.values())


def stored_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The floating dtype most tensors have: what the model computes in and scales are kept in."""
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1)
    if not counts:
        raise CheckpointError("the checkpoint has no floating-point weights to compress")
    return counts.most_common(1)[0][0]
