"""Saving: a standard checkpoint directory, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serval.errors import CheckpointError, ConfigError
from serval.models.checkpoint.family import Family, Piece, explain_loss
from serval.models.checkpoint.files import INDEX, PRIVATE, TOKENIZER_FILES, WEIGHTS
from serval.models.checkpoint.hub_config import write_variants
from serval.models.checkpoint.quantized import PRIVATE_LEAVES, CheckpointModule
from serval.models.checkpoint.registry import FAMILIES, family_named
from serval.models.checkpoint.safetensors_file import TensorToWrite, write_file
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder


def save(
    decoder: Decoder,
    directory: str | Path,
    *,
    family: str | None = None,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write config.json, generation_config.json, safetensors weights and the tokenizer's files.

    family: the format; None means `decoder.config.family`. tokenizer_dir: where to copy the
    tokenizer from. dtype: of the stored parameters; None keeps theirs (router buffers stay
    float32). Everything is written and flushed beside `directory`, then renamed into place; an
    earlier checkpoint there is replaced, other files in it are kept. Returns the directory. Raises
    ConfigError when the family cannot express the model, CheckpointError when the disk is full or
    not writable; then nothing is left behind.
    """
    format_ = choose_family(decoder.config, family)
    tensors = list(part_tensors(decoder, format_, dtype))
    tensors += repeated_tensors(decoder, format_, tensors, dtype)
    return write_checkpoint(
        directory,
        decoder,
        format_,
        tensors,
        tokenizer_dir=tokenizer_dir,
        max_shard_bytes=max_shard_bytes,
    )


def write_checkpoint(
    directory: str | Path,
    decoder: Decoder,
    family: Family,
    tensors: Sequence[TensorToWrite],
    *,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    also: Mapping[str, bytes] | None = None,
    staging_parent: Path | None = None,
) -> Path:
    """As `save`, for tensors that need not be the decoder's own: of `decoder` only its config and
    `quantization_config` are read. also: more files, by name. staging_parent: where everything is
    written before it is renamed, on the disk of `directory` (None: beside it)."""
    directory = Path(directory).expanduser().resolve()
    needed = sum(tensor.nbytes for tensor in tensors)
    staging: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        where = staging_parent or directory.parent
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=where))
        _write_weights(staging, list(tensors), max_shard_bytes)
        _write_configs(staging, decoder, family, tensors)
        _copy_tokenizer(staging, tokenizer_dir)
        for name, content in (also or {}).items():
            (staging / name).write_bytes(content)
        staging.chmod(0o777 & ~_umask())
        _move_into_place(staging, directory)
    except OSError as error:
        raise CheckpointError(_explain(error, directory, needed)) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def choose_family(config: ModelConfig, name: str | None = None) -> Family:
    """The family to write `config` in: `name`, or the config's own.

    Raises ConfigError when it cannot express the model, naming the field and families that can.
    """
    family = family_named(name or config.family)
    lost = explain_loss(family, config)
    if lost is None:
        return family
    able = [other for other in FAMILIES if explain_or_refuse(other, config) is None]
    hint = f"families that can: {', '.join(able)}" if able else "no family can"
    raise ConfigError(f"checkpoint family {family.model_type!r} cannot express {lost}; {hint}")


def explain_or_refuse(name: str, config: ModelConfig) -> str | None:
    """As `explain_loss`, with a family that cannot even be asked counting as a loss."""
    try:
        return explain_loss(family_named(name), config)
    except (ConfigError, AssertionError) as error:
        return str(error)


def part_tensors(
    decoder: Decoder, family: Family, dtype: torch.dtype | None = None, path: str = ""
) -> Iterator[TensorToWrite]:
    """The stored tensors of the decoder's module `path` ("": all of it), without repeated ones."""
    config = decoder.config
    latest = _Latest()

    def walk(prefix: str, module: nn.Module) -> Iterator[TensorToWrite]:
        if prefix and isinstance(module, CheckpointModule):
            base = family.rename(prefix, config)
            for leaf, (shape, kind) in module.checkpoint_spec().items():
                yield TensorToWrite(
                    f"{base}.{leaf}", kind, tuple(shape), latest.later(module, leaf)
                )
            return
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = dtype if dtype and parameter.is_floating_point() else parameter.dtype
            for piece in family.pieces(_join(prefix, leaf), parameter.detach(), config):
                yield _write_piece(piece, kind)
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                for piece in family.pieces(_join(prefix, leaf), buffer.detach(), config):
                    yield _write_piece(piece, buffer.dtype)
        for name, child in module.named_children():
            yield from walk(_join(prefix, name), child)

    yield from walk(path, decoder.get_submodule(path))


def repeated_tensors(
    decoder: Decoder,
    family: Family,
    tensors: Sequence[TensorToWrite],
    dtype: torch.dtype | None = None,
) -> Iterator[TensorToWrite]:
    """What the family stores a second time, and zeros that its readers insist on. tensors: those
    of all parts."""
    config = decoder.config
    written = {tensor.name: tensor for tensor in tensors}
    for name, source in family.copies(config).items():
        original = written[family.rename(source, config)]
        yield TensorToWrite(name, original.dtype, original.shape, original.make)
    filler = dtype or decoder.norm.weight.dtype
    for name, shape in family.fillers(config).items():
        yield TensorToWrite(name, filler, shape, _zeros(shape, filler))


class _Latest:
    """Unpacks a module once for all of its tensors, and holds only the last one's."""

    def __init__(self) -> None:
        self.module: CheckpointModule | None = None
        self.tensors: Mapping[str, Tensor] = {}

    def later(self, module: CheckpointModule, leaf: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if self.module is not module:
                self.tensors = {}
                self.module, self.tensors = module, module.checkpoint_tensors()
            return self.tensors[leaf]

        return make


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape, dtype=dtype)


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf


def _write_piece(piece: Piece, dtype: torch.dtype) -> TensorToWrite:
    return TensorToWrite(piece.name, dtype, piece.shape, lambda: piece.view.reshape(piece.shape))


def _write_weights(directory: Path, tensors: list[TensorToWrite], limit: int) -> None:
    private = [tensor for tensor in tensors if tensor.name.endswith(PRIVATE_LEAVES)]
    if private:
        write_file(directory / PRIVATE, private)
        tensors = [tensor for tensor in tensors if not tensor.name.endswith(PRIVATE_LEAVES)]
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_configs(
    directory: Path, decoder: Decoder, family: Family, tensors: Sequence[TensorToWrite]
) -> None:
    config = decoder.config
    values = write_variants(config, family.write_config(config))
    embedding = family.rename("embed_tokens.weight", config)
    named = [t.dtype for t in tensors if t.name == embedding]
    kinds = [t for t in [*named, *(t.dtype for t in tensors)] if t.is_floating_point]
    if kinds:  # the embedding's, or if it is quantised that of the first float tensor
        values["dtype"] = str(kinds[0]).removeprefix("torch.")
    if decoder.quantization_config is not None:
        values["quantization_config"] = decoder.quantization_config
    _write_json(directory / "config.json", values)
    generation = {
        key: value
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := getattr(config, key)) is not None
    }
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **generation})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _copy_tokenizer(directory: Path, source: str | Path | None) -> None:
    if source is None:
        return
    source = Path(source)
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise CheckpointError(f"{source} holds no tokenizer (no {TOKENIZER_FILES[0]})")
    for name in found:
        shutil.copyfile(source / name, directory / name)
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())


def _move_into_place(staging: Path, directory: Path) -> None:
    _sync_directory(staging)
    if not directory.exists():
        staging.rename(directory)
    elif (directory / "config.json").exists() and directory != Path.cwd():
        _swap(staging, directory)
    else:
        _move_files(staging, directory)
    _sync_directory(directory.parent)


def _swap(staging: Path, directory: Path) -> None:
    """Replace a checkpoint by renaming; a crash in between leaves both complete, one of them under
    a temporary name. Files that are not part of a checkpoint move over."""
    backup = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
    old = backup / directory.name
    try:
        directory.rename(old)
    except OSError:  # a mount point, for example
        backup.rmdir()
        _move_files(staging, directory)
        return
    try:
        staging.rename(directory)
    except OSError:
        old.rename(directory)
        backup.rmdir()
        raise
    for path in old.iterdir():
        if not _is_ours(path) and not (directory / path.name).exists():
            path.rename(directory / path.name)
    shutil.rmtree(backup, ignore_errors=True)


def _move_files(staging: Path, directory: Path) -> None:
    """Fill a directory that stays what it is; config.json, which makes it loadable, comes last."""
    new = {path.name for path in staging.iterdir()}
    (directory / "config.json").unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if _is_ours(path) and path.name not in new:
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda p: p.name == "config.json"):
        path.replace(directory / path.name)
    _sync_directory(directory)


def _is_ours(path: Path) -> bool:
    """Whether a save would write, or would have written, a file of this name."""
    shard = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path.name)
    return bool(shard) or path.name in ("config.json", "generation_config.json", INDEX, PRIVATE)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explain(error: OSError, directory: Path, needed: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            free = f"{shutil.disk_usage(directory.parent).free / 1e6:.1f} MB free"
        except OSError:
            free = "free space unknown"
        return (
            f"no room to save to {directory}: the weights need {needed / 1e6:.1f} MB ({free}); "
            "free some space or choose another directory. Nothing was left behind"
        )
    return f"cannot save to {directory}: {error.strerror or error}. Nothing was left behind"
