"""`serval tune RECIPE`: supervised fine-tuning with all weights, LoRA or AFA-LoRA.

The loop, its checkpoints and reports are those of `serval train`. A run's directory holds what that
command's does, and at the end::

    adapter/    a plain PEFT LoRA (method lora, afa-lora)
    model/      an ordinary checkpoint (method full, or merge: true)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serval.adapt.merging import merge_checkpoint
from serval.adapt.methods import Full
from serval.adapt.peft_format import save_adapter
from serval.adapt.recipe import TuneRecipe, load_tune_recipe
from serval.data.instructions import Encoder, Instructions, InstructionStream, read_instructions
from serval.data.tokenizer import load_tokenizer
from serval.errors import ConfigError, DataError
from serval.models import checkpoint as weights
from serval.models.decoder import Decoder
from serval.optim import build
from serval.train.curve import draw_curve
from serval.train.distributed import World, whole
from serval.train.loop import Trainer
from serval.train.reporting import Callback
from serval.train.run import export, prepare_directory, reports, seed_everything, settings_of
from serval.train.stream import Row


@dataclass
class Result:
    """How a run ended. adapter, model: what was written, None when it was not."""

    step: int
    interrupted: bool
    adapter: Path | None = None
    model: Path | None = None


def run(
    recipe_path: str | Path,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = print,
) -> Result:
    """Tune as the recipe says, resuming from its output directory unless `fresh`.

    Under torchrun every process calls this. Raises ConfigError, DataError or CheckpointError.
    """
    recipe = load_tune_recipe(recipe_path, overrides)
    world = World.join(recipe.train.device)
    result = _run(recipe, world, fresh, callbacks, note, str(recipe_path))
    world.leave()
    return result


def _run(
    recipe: TuneRecipe,
    world: World,
    fresh: bool,
    callbacks: Sequence[Callback],
    note: Callable[[str], None],
    recipe_path: str,
) -> Result:
    if not world.is_main:
        note = _silent
    seed_everything(recipe.seed, recipe.train.deterministic)
    source = weights.locate(recipe.model)
    template = _chat_template(recipe)
    stream, validation = build_data(recipe, source, template, note)
    steps = recipe.train.steps or steps_of(recipe, stream)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
    schedule = recipe.schedule.build(steps)
    method = recipe.build_method()
    prepare_directory(recipe, world, fresh)
    decoder = weights.load(source, dtype=torch.float32)
    method.prepare(decoder)
    trainer = Trainer(
        decoder,
        lambda model: build(recipe.optimizer.name, model, recipe.optimizer.options(), note),
        schedule,
        stream,
        settings_of(recipe, world),
        validation=validation,
        # the method's first: an adapter whose beta reached 0 in this step may be rescaled in it
        callbacks=[
            *method.callbacks(steps, note),
            *recipe.build_callbacks(),
            *reports(recipe, world, note),
            *callbacks,
        ],
        world=world,
        note=note,
    )
    _announce(decoder, recipe, steps, note)
    trainer.fit()
    if world.is_main:
        draw_curve(recipe.directory / "log.jsonl", recipe.directory / "loss.png")
    if trainer.interrupted and trainer.step < steps:
        note(f"stopped at step {trainer.step}; resume with: serval tune {recipe_path}")
        return Result(trainer.step, True)
    return _finish(trainer, recipe, method, source, template, note)


def _finish(
    trainer: Trainer,
    recipe: TuneRecipe,
    method: Full,
    source: Path,
    template: str | None,
    note: Callable[[str], None],
) -> Result:
    """Write what was trained."""
    result = Result(trainer.step, False)
    target = recipe.directory / "model"
    if not method.writes_adapter:

        def write(complete: Decoder, folder: Path) -> None:
            weights.save(complete, folder, tokenizer_dir=source)
            if template is not None:
                (folder / "chat_template.jinja").write_text(template)

        result.model = export(trainer, write, target)
        note(f"model written to {target}; try: serval serve {target}")
        return result
    adapter = recipe.directory / "adapter"
    save_adapter(trainer.decoder, adapter, str(recipe.model), whole, write=trainer.world.is_main)
    result.adapter = adapter
    note(f"adapter written to {adapter}; try: serval serve {recipe.model} --lora tuned={adapter}")
    if recipe.merge:
        if trainer.world.is_main:
            merge_checkpoint(source, adapter, target, chat_template=template, force=True)
        trainer.world.barrier()
        result.model = target
        note(f"merged model written to {target}")
    return result


def build_data(
    recipe: TuneRecipe, source: Path, template: str | None, note: Callable[[str], None]
) -> tuple[InstructionStream, list[Row]]:
    """The training stream and the packed validation rows, which may be none."""
    data = recipe.data
    tokenizer = load_tokenizer(source)
    if template is not None:
        tokenizer.chat_template = template
    encoder = Encoder(tokenizer, _eos(tokenizer, source), data.format, data.mask_prompt)
    apart = data.validation_path is None and data.validation_fraction > 0
    train = read_instructions(
        data.path, encoder, data.row_tokens, "train" if apart else None, data.validation_fraction
    )
    if not train.documents:
        raise DataError(
            f"{data.path} holds no example with something to predict in its first "
            f"{data.row_tokens} tokens"
        )
    note(f"{len(train.documents)} examples from {data.path}{_losses(train, data.row_tokens)}")
    held_out = Instructions([])
    if data.validation_path is not None:
        held_out = read_instructions(data.validation_path, encoder, data.row_tokens)
        if not held_out.documents:
            raise DataError(f"{data.validation_path} holds no example with something to predict")
    elif apart:
        held_out = read_instructions(
            data.path, encoder, data.row_tokens, "validation", data.validation_fraction
        )
    rows: list[Row] = []
    if held_out.documents:
        stream = InstructionStream(held_out.documents, data.row_tokens, recipe.seed)
        rows = [stream.next() for _ in range(min(data.validation_rows, stream.rows_per_epoch))]
    elif apart:
        note("no example fell into the validation split; nothing will be validated")
    return InstructionStream(train.documents, data.row_tokens, recipe.seed), rows


def steps_of(recipe: TuneRecipe, stream: InstructionStream) -> int:
    """Optimizer steps of `train.epochs` passes over the rows."""
    rows = recipe.train.epochs * stream.rows_per_epoch
    return max(1, math.ceil(rows / recipe.train.batch_rows))


def _losses(read: Instructions, row_tokens: int) -> str:
    parts = []
    if read.cut:
        parts.append(f"{read.cut} longer than {row_tokens} tokens were cut")
    if read.dropped:
        parts.append(f"{read.dropped} had nothing left to predict and were dropped")
    return f" ({'; '.join(parts)})" if parts else ""


def _eos(tokenizer: Any, source: Path) -> int:
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    ids = weights.read_config(source).eos_token_ids()
    if not ids:
        raise DataError(
            f"neither the tokenizer nor config.json of {source} names an end-of-text token; "
            "examples could not be ended"
        )
    return ids[0]


def _chat_template(recipe: TuneRecipe) -> str | None:
    path = recipe.data.chat_template
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template {path!r} cannot be read: {error}") from error


def _announce(
    decoder: Decoder, recipe: TuneRecipe, steps: int, note: Callable[[str], None]
) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    trained = sum(size for size, wanted in sizes if wanted)
    note(
        f"{recipe.method}: training {trained:,} of {sum(size for size, _ in sizes):,} parameters "
        f"for {steps} steps, output {recipe.directory}"
    )


def _silent(line: str) -> None:
    """Only the main process speaks."""
