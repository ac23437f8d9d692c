"""`serval prune MODEL --out DIR`: from a checkpoint to a narrower one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import serval
from serval.compress.maskprune.recover import Pruning, PruningReport, prune_decoder
from serval.compress.maskprune.rows import default_source, make_stream, text_state
from serval.compress.pipeline import (
    check_output,
    copied_files,
    has_tokenizer,
    stored_bytes,
    stored_dtype,
)
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.checkpoint.files import list_tensors, locate
from serval.models.checkpoint.writing import (
    choose_family,
    part_tensors,
    repeated_tensors,
    write_checkpoint,
)

LENGTH = 512  # tokens of a row
REPORT = "pruning.json"  # beside the weights: how they were made


@dataclass
class PruneOptions(Pruning):
    """model: checkpoint directory or hub name. out: directory to write. data: what to train on, see
    `rows.py` (None: the model's recipe, or the standard library); length: tokens of a row (None:
    512, or the model's positions where they are fewer); text_field: of JSONL or Parquet. force:
    replace a checkpoint at `out`, and forget an interrupted run's state."""

    model: str | Path
    out: str | Path
    data: str | None = field(default=None, kw_only=True)
    length: int | None = field(default=None, kw_only=True)
    text_field: str = field(default="text", kw_only=True)
    force: bool = field(default=False, kw_only=True)


@dataclass
class PruneResult:
    """What was written. bytes: of all stored tensors, before and after."""

    directory: Path
    data: str
    report: PruningReport
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "directory": str(self.directory)}


def run(
    options: PruneOptions,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = print,
) -> PruneResult:
    """Prune a checkpoint. progress: told the steps done and all steps.

    The output is complete or absent. A run stopped by Ctrl-C raises KeyboardInterrupt and goes on
    when it is started again with the same options. Raises ConfigError for options that do not fit,
    DataError for text that is missing, CheckpointError for a checkpoint that cannot be read or
    written.
    """
    options.check()
    source, out = locate(options.model), Path(options.out).expanduser()
    check_output(source, out, options.force)
    stored = list_tensors(source)
    dtype = stored_dtype([tensor.dtype for tensor in stored.values()])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = checkpoint.load(source, dtype=torch.float32, device=device)
    family = choose_family(decoder.config)
    length = _length(options.length, decoder.config.max_position_embeddings)
    data = options.data or default_source(source)
    stream = make_stream(
        data,
        source,
        decoder.config,
        lambda: decoder,
        rows=options.calibration_rows + options.steps * options.batch_rows,
        length=length,
        field=options.text_field,
        seed=options.seed,
    )
    partial = out.resolve().parent / f".{out.name}.partial"
    if options.force:
        shutil.rmtree(partial, ignore_errors=True)
    pruned, report = prune_decoder(
        decoder,
        options,
        stream,
        directory=partial,
        fingerprint={
            **_described(options),
            "weights": _digest(source),
            "text": text_state(data, source),
        },
        progress=progress,
        note=note,
    )
    pruned = pruned.cpu()
    tensors = list(part_tensors(pruned, family, dtype))
    tensors += repeated_tensors(pruned, family, tensors, dtype)
    made = {"options": _described(options), "data": data, **report.to_dict()}
    write_checkpoint(
        out,
        pruned,
        family,
        tensors,
        tokenizer_dir=source if has_tokenizer(source) else None,
        also={REPORT: json.dumps(made, indent=1).encode() + b"\n", **copied_files(source)},
    )
    shutil.rmtree(partial, ignore_errors=True)
    after = sum(tensor.nbytes for tensor in tensors)
    return PruneResult(out, data, report, stored_bytes(stored), after)


def summary(result: PruneResult) -> Iterator[str]:
    """Lines about a result."""
    report = result.report
    before, after = report.parameters_before, report.parameters_after
    yield (
        f"wrote {result.directory}: {before / 1e6:.2f} M to {after / 1e6:.2f} M parameters "
        f"({after / before:.1%}), {result.bytes_before / 1e6:.1f} to "
        f"{result.bytes_after / 1e6:.1f} MB, by {report.method}, {report.seconds:.1f} s"
    )
    widths = ", ".join(f"{w} of {report.units[kind]} {kind}" for kind, w in report.widths.items())
    yield f"every layer keeps {widths}; {report.fraction:.1%} of the budget's cost"
    if report.loss is not None:
        yield f"training loss on {result.data}: {report.loss[0]:.3f} to {report.loss[1]:.3f} nats"
    if report.facts.get("residual") is not None:
        share = report.facts["residual"]
        yield f"largest mask that was cut: {share:.2%} of the median kept one"


def _length(wanted: int | None, most: int) -> int:
    """Tokens of a row of a model with `most` positions."""
    if wanted is None:
        return min(LENGTH, most)
    if not 2 <= wanted <= most:
        raise ConfigError(f"length is {wanted}; expected 2 to {most}, the model's positions")
    return wanted


def _digest(source: Path) -> str:
    """Of the checkpoint's weights, wherever they lie."""
    whole = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _described(options: PruneOptions) -> dict[str, Any]:
    """What was asked for, as JSON values."""
    values = {k: v for k, v in asdict(options).items() if k not in ("model", "out", "force")}
    model = str(Path(options.model).expanduser())
    return {**values, "model": Path(model).name, "version": serval.__version__}
