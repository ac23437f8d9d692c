"""`serval train RECIPE`: from a recipe to a trained model in Hugging Face's layout.

A run's directory holds::

    recipe.yaml     the recipe as checked     log.jsonl      one line per step and validation
    loss.png        the loss curve
    tokenizer/      trained or copied         tensorboard/   when asked for
    checkpoints/    newest few, resumable     model/         the result, loads in transformers
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from serval.data import options as data_options
from serval.data.options import Data
from serval.data.tokenizer import END_OF_TEXT, IM_END, save_tokenizer
from serval.errors import ConfigError, MissingExtraError
from serval.models import checkpoint as weights
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.models.initialize import INITIALIZERS
from serval.optim import build
from serval.registry import resolve
from serval.train import checkpoint
from serval.train.curve import draw_curve
from serval.train.distributed import World, whole
from serval.train.loop import Settings, Trainer, best_dtype
from serval.train.recipe import Recipe, Run, check_model, load_recipe
from serval.train.reporting import Callback, Console, JsonLog, TensorBoard


@dataclass
class Result:
    """How a run ended. model: the exported directory, None when the run was interrupted."""

    step: int
    interrupted: bool
    model: Path | None


def run(
    recipe_path: str | Path,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = print,
) -> Result:
    """Train as the recipe says, resuming from its output directory unless `fresh`.

    Under torchrun every process calls this. Raises ConfigError, DataError or CheckpointError.
    """
    recipe = load_recipe(recipe_path, overrides)
    world = World.join(recipe.train.device)
    result = _run(recipe, world, fresh, callbacks, note, str(recipe_path))
    world.leave()  # not after an error: the others may wait for this process elsewhere
    return result


def _run(
    recipe: Recipe,
    world: World,
    fresh: bool,
    callbacks: Sequence[Callback],
    note: Callable[[str], None],
    recipe_path: str,
) -> Result:
    if not world.is_main:
        note = _silent
    directory = recipe.directory
    seed_everything(recipe.seed, recipe.train.deterministic)
    prepare_directory(recipe, world, fresh)
    data = build_data(recipe, world, note)
    decoder = build_decoder(recipe, data)
    rows = [data.validation.next() for _ in range(recipe.data.validation_rows)]
    trainer = Trainer(
        decoder,
        lambda model: build(recipe.optimizer.name, model, recipe.optimizer.options(), note),
        recipe.schedule.build(recipe.train.steps),
        data.train,
        settings_of(recipe, world),
        validation=rows,
        # methods first: reports then see what they add to a step's metrics
        callbacks=[*recipe.build_callbacks(), *reports(recipe, world, note), *callbacks],
        world=world,
        note=note,
    )
    parameters = sum(p.numel() for p in decoder.parameters())
    note(
        f"training {parameters / 1e6:.1f} M parameters in "
        f"{str(trainer.settings.dtype).removeprefix('torch.')} on {world.size} x {world.device}, "
        f"output {directory}"
    )
    trainer.fit()
    if world.is_main:
        draw_curve(directory / "log.jsonl", directory / "loss.png")
    if trainer.interrupted and trainer.step < recipe.train.steps:
        note(f"stopped at step {trainer.step}; resume with: serval train {recipe_path}")
        return Result(trainer.step, True, None)

    def write(complete: Decoder, folder: Path) -> None:
        weights.save(complete, folder)
        save_tokenizer(data.tokenizer, folder, complete.config.max_position_embeddings)
        shutil.copy(directory / "recipe.yaml", folder)  # tells an evaluation what was held out

    target = export(trainer, write, directory / "model")
    note(f"model written to {target}; try: serval serve {target}")
    return Result(trainer.step, False, target)


def _silent(line: str) -> None:
    """Only the main process speaks."""


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch, numpy and Python; `deterministic` forbids operations that are not."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def prepare_directory(recipe: Run, world: World, fresh: bool) -> None:
    """Create the output directory with a copy of the recipe; `fresh` clears an earlier run."""
    directory = recipe.directory
    if world.is_main:
        text = yaml.safe_dump(recipe.written(), sort_keys=False)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if fresh:
                for name in ("checkpoints", "tokenizer", "tensorboard", "model"):
                    shutil.rmtree(directory / name, ignore_errors=True)
            (directory / "recipe.yaml").write_text(text)
        except OSError as error:
            raise ConfigError(
                f"output: cannot create {recipe.output!r} ({error.strerror}); make room or set "
                "another 'output'"
            ) from error
    world.barrier()


def build_data(recipe: Recipe, world: World, note: Callable[[str], None]) -> Data:
    """Tokenizer and streams. A run that resumes keeps the tokenizer it began with."""
    target = recipe.directory / "tokenizer"
    begun = bool(checkpoint.list_checkpoints(recipe.directory / "checkpoints"))
    if world.is_main and not (begun and (target / "tokenizer.json").exists()):
        if recipe.data.tokenizer.path is None:
            note(f"training a tokenizer of {recipe.data.tokenizer.vocab_size} entries")
        made = data_options.make_tokenizer(recipe.data, recipe.seed)
        temporary = target.with_name(".writing-tokenizer")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            save_tokenizer(made, temporary, _context(recipe))
            checkpoint.publish(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise checkpoint.disk_error(target, error) from error
    world.barrier()
    chosen = recipe.data.tokenizer.model_copy(update={"path": str(target)})
    return data_options.build(recipe.data.model_copy(update={"tokenizer": chosen}), recipe.seed)


def _context(recipe: Recipe) -> int:
    values = recipe.model.get("max_position_embeddings")
    return values if isinstance(values, int) else recipe.data.row_tokens


def build_decoder(recipe: Recipe, data: Data) -> Decoder:
    """A decoder with fresh weights, or the one under `model.path`."""
    if "path" in recipe.model:
        decoder = weights.load(recipe.model["path"], dtype=torch.float32)
        config = decoder.config
    else:
        config = model_config(recipe, data)
        decoder = Decoder(config)
        resolve(INITIALIZERS, recipe.initializer, "initializer")(decoder)
    if config.vocab_size < data.tokenizer.get_vocab_size():
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}, the tokenizer has "
            f"{data.tokenizer.get_vocab_size()} entries; leave it out to use the tokenizer's"
        )
    return decoder


def model_config(recipe: Recipe, data: Data) -> ModelConfig:
    """The recipe's `model` section completed by what the tokenizer determines."""
    values: dict[str, Any] = {
        "vocab_size": data.tokenizer.get_vocab_size(),
        "eos_token_id": [data.tokenizer.token_to_id(name) for name in (IM_END, END_OF_TEXT)],
        **recipe.model,
    }
    return check_model(values, "recipe")


def settings_of(recipe: Run, world: World) -> Settings:
    train = recipe.train
    chosen = recipe.model_dump(mode="json", exclude_defaults=True)
    return Settings(
        steps=train.steps,
        batch_rows=train.batch_rows,
        micro_batch_rows=train.micro_batch_rows,
        clip_norm=train.clip_norm,
        z_loss=train.z_loss,
        mtp_weight=train.mtp_weight,
        dtype=best_dtype(train.dtype, world.device),
        validate_every=recipe.validation.every,
        checkpoint_every=recipe.checkpoint.every,
        keep_checkpoints=recipe.checkpoint.keep,
        directory=recipe.directory / "checkpoints",
        fingerprint=recipe.fingerprint(),
        defaults=frozenset(checkpoint.flatten(recipe.fingerprint()))
        - checkpoint.flatten(chosen).keys(),
    )


def reports(recipe: Run, world: World, note: Callable[[str], None]) -> list[Callback]:
    """What reports on the run: log.jsonl, console, TensorBoard; the main process only."""
    if not world.is_main:
        return []
    found: list[Callback] = [
        JsonLog(recipe.directory / "log.jsonl"),
        Console(recipe.train.steps, recipe.train.log_every),
    ]
    if recipe.tensorboard:
        try:
            found.append(TensorBoard(recipe.directory / "tensorboard"))
        except MissingExtraError as error:
            note(f"no TensorBoard log: {error}")
    return found


def export(trainer: Trainer, write: Callable[[Decoder, Path], None], target: Path) -> Path:
    """Publish at `target` what `write` puts of the whole model into a folder; a collective call.

    Raises CheckpointError when the disk is full or not writable; then nothing is left behind."""
    decoder = trainer.decoder
    state = {name: whole(tensor).cpu() for name, tensor in decoder.state_dict().items()}
    if trainer.world.is_main:
        complete = decoder
        if trainer.world.size > 1 or trainer.world.device.type != "cpu":
            with torch.device("meta"):
                complete = Decoder(decoder.config)
            complete.load_state_dict(state, assign=True)
        temporary = target.with_name(".writing-model")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(complete, temporary)
            checkpoint.publish(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise checkpoint.disk_error(target, error) from error
    trainer.world.barrier()
    return target
