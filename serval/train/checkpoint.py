"""Training checkpoints: atomic, free of pickle, enough to continue bit for bit.

Layout of a run's directory::

    checkpoints/step-00000200/state.safetensors   model, optimizer and RNG tensors (one process)
    checkpoints/step-00000200/*.safetensors       the same, sharded (several processes, DCP)
    checkpoints/step-00000200/state.json          step, data position, RNG of Python, recipe

A checkpoint is written under a hidden temporary name, flushed to disk and renamed; a directory
with its final name is complete. What a crash leaves behind has the temporary name and is removed by
the next run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from serval.errors import CheckpointError, ConfigError
from serval.train.distributed import World, read_sharded, write_sharded

FORMAT = 1
_PREFIX = "step-"
_TEMPORARY = ".writing-"


@dataclass
class Saved:
    """A complete checkpoint on disk."""

    step: int
    path: Path

    def meta(self) -> dict[str, Any]:
        """Read state.json; raises CheckpointError when it cannot be read."""
        path = self.path / "state.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format {values.get('format')!r}, this version reads {FORMAT}"
            )
        return values

    def files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))


def list_checkpoints(directory: Path) -> list[Saved]:
    """Complete checkpoints under `directory`, oldest first."""
    found = []
    for path in directory.glob(f"{_PREFIX}*"):
        digits = path.name.removeprefix(_PREFIX)
        if path.is_dir() and digits.isdigit():
            found.append(Saved(int(digits), path))
    return sorted(found, key=lambda saved: saved.step)


def latest_usable(directory: Path, note: Callable[[str], None] = print) -> Saved | None:
    """The newest checkpoint that opens; damaged ones are named through `note` and passed over."""
    for saved in reversed(list_checkpoints(directory)):
        try:
            saved.meta()
            if not saved.files():
                raise CheckpointError(f"{saved.path} holds no .safetensors file")
            for file in saved.files():
                with safe_open(file, framework="pt") as handle:
                    handle.keys()
            return saved
        except (CheckpointError, SafetensorError, OSError) as error:
            note(f"passing over damaged checkpoint {saved.path.name}: {error}")
    return None


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    directory: Path,
    step: int,
    meta: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write one checkpoint atomically and drop all but the newest `keep`; a collective call.

    Raises CheckpointError on every rank (disk full, no permission), with nothing left behind.
    """
    world = world or World()
    final = directory / f"{_PREFIX}{step:08d}"
    temporary = directory / f"{_TEMPORARY}{final.name}"

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def write() -> None:
        if world.size > 1:
            write_sharded(tensors, temporary)
        else:
            own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(own, temporary / "state.safetensors")

    def finish() -> None:
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **meta}))
        publish(temporary, final)
        for old in list_checkpoints(directory)[:-keep]:
            shutil.rmtree(old.path, ignore_errors=True)

    for phase, everyone in ((prepare, False), (write, True), (finish, False)):
        failure: Exception | None = None
        if everyone or world.is_main:
            try:
                phase()
            except (OSError, SafetensorError) as error:
                failure = error
        if world.any(failure is not None):
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise disk_error(directory, failure) from failure
    return final


def load_checkpoint(saved: Saved, tensors: dict[str, Tensor], world: World | None = None) -> None:
    """Fill `tensors` in place from a checkpoint written by any number of processes.

    Raises CheckpointError naming a tensor that is missing, left over or of another shape.
    """
    names = saved_names(saved)
    if missing := sorted(tensors.keys() - names):
        raise CheckpointError(
            f"{saved.path} lacks '{missing[0]}' ({len(missing)} missing in all); it was written by "
            "another model or optimizer: use its own recipe, or another 'output'"
        )
    # a GPU's generator has no counterpart on a machine without one
    if extra := sorted(name for name in names - tensors.keys() if not name.startswith("rng.")):
        raise CheckpointError(
            f"{saved.path} has '{extra[0]}' ({len(extra)} left over), unknown to this model or "
            "optimizer: use the recipe it was written with, or another 'output'"
        )
    read_sharded(tensors, saved.path, alone=world is None or world.size == 1)


def saved_names(saved: Saved) -> set[str]:
    """Names of the tensors in a checkpoint."""
    names: set[str] = set()
    for file in saved.files():
        with safe_open(file, framework="pt") as handle:
            names.update(handle.keys())
    return names


def publish(temporary: Path, final: Path) -> None:
    """Flush a finished directory to disk and give it its final name in one step."""
    for file in temporary.iterdir():
        _fsync(file)
    _fsync(temporary)
    if final.exists():  # a damaged or re-done checkpoint of the same step
        shutil.rmtree(final)
    os.rename(temporary, final)
    _fsync(final.parent)


def disk_error(directory: Path, error: Exception | None) -> CheckpointError:
    """Turn an I/O failure into a message that says what to do."""
    free = shutil.disk_usage(directory).free / 2**20 if directory.exists() else 0.0
    cause = "another process failed" if error is None else error
    return CheckpointError(
        f"could not save a checkpoint in {directory}: {cause}. {free:.0f} MiB are free there; "
        "make room or set another 'output', then run the same command to resume"
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rng_tensors() -> dict[str, Tensor]:
    """State of torch's generators as uint8 tensors."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def rng_values() -> dict[str, Any]:
    """State of Python's and numpy's generators as JSON values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, cached],
    }


def restore_rng(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put back what `rng_tensors` and `rng_values` returned."""
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    state = (kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002


_FREE = {"model.family"}  # the format of the result: changing it changes no number of the run


def check_fingerprint(
    saved: Saved,
    before: dict[str, Any] | None,
    now: dict[str, Any] | None,
    defaults: Collection[str] = (),
) -> None:
    """Refuse to continue a run whose recipe changed; raises ConfigError naming the key.

    defaults: keys ("section.key") whose value now is the option's default. What the checkpoint does
    not know of was an option that did not exist, whose default is what it did.
    """
    if before is None or now is None:
        return
    old, new = flatten(before), flatten(json.loads(json.dumps(now)))
    for key in sorted((old.keys() | new.keys()) - _FREE):
        if key not in old and key in defaults:
            continue
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{saved.path} was written with {key} = {old.get(key)!r}, the recipe now says "
                f"{new.get(key)!r}; change it back, or choose another 'output' to start afresh"
            )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections, by "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
