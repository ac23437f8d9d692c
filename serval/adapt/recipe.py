"""The recipe of `serval tune`: one YAML file describes a fine-tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from serval.adapt import METHODS
from serval.adapt.methods import AdapterSection, Full, Lora
from serval.data.instructions import Format
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.checkpoint.files import read_json
from serval.registry import resolve
from serval.train.recipe import Run, check_section, read_values
from serval.train.sections import (
    NonNegative,
    OptimizerSection,
    Positive,
    ScheduleSection,
    Section,
    TrainSection,
)


class TuneData(Section):
    """Where examples come from, see `serval.data.instructions`.

    path: a JSONL file. format: chat, completion or auto (per line). chat_template: a Jinja file
    instead of the model's. mask_prompt: only answers count in the loss. row_tokens: of a packed
    row; longer examples are cut. validation_path: a file of its own, or else validation_fraction of
    the lines. validation_rows: at most so many rows are scored.
    """

    path: str
    format: Format = "auto"
    chat_template: str | None = None
    mask_prompt: bool = True
    row_tokens: Annotated[int, Field(ge=8)] = 1024
    validation_path: str | None = None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    validation_rows: Positive = 16


class TuneTrain(TrainSection):
    """As in `serval train`; steps: 0 means as many as `epochs` passes over the data need."""

    steps: NonNegative = 0
    epochs: Annotated[float, Field(gt=0)] = 1.0


class TuneRecipe(Run):
    """One run of `serval tune`.

    model: checkpoint directory or hub name, float weights. method: a key of
    `serval.adapt.METHODS`. merge: also write the merged model (an adapter method).
    """

    model: str
    method: str = "lora"
    data: TuneData
    adapter: AdapterSection = AdapterSection()
    merge: bool = False
    optimizer: OptimizerSection = OptimizerSection(lr=3e-4, weight_decay=0.0)
    schedule: ScheduleSection = ScheduleSection(name="cosine")
    train: TuneTrain = TuneTrain()

    def fingerprint(self) -> dict[str, Any]:
        """Steps count too: an annealing is a share of them."""
        values = super().fingerprint()
        return {**values, "steps": self.train.steps}

    def written(self) -> dict[str, Any]:
        """Also without the keys of `adapter` that the method would refuse."""
        values = super().written()
        refused = resolve(METHODS, self.method, "method").refused
        values["adapter"] = {k: v for k, v in values["adapter"].items() if k not in refused}
        return values

    def build_method(self) -> Full:
        """The method; raises ConfigError for keys of `adapter` that it would not read."""
        kind: type[Full] = resolve(METHODS, self.method, "method")
        given = {key for key in kind.refused if key in self.adapter.model_fields_set}
        useless = sorted(key for key in given if getattr(self.adapter, key) is not None)
        if useless:
            raise ConfigError(
                f"adapter.{useless[0]} means nothing to method {self.method!r}; leave it out, set "
                "it to null, or choose another method"
            )
        if self.merge and not kind.writes_adapter:
            raise ConfigError(
                f"merge: method {self.method!r} has no adapter to merge; leave it out"
            )
        method = kind(self.adapter)
        if isinstance(method, Lora):
            _ = method.options  # checks its numbers
        return method


def load_tune_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TuneRecipe:
    """Read and check a recipe; raises ConfigError naming the file and every wrong key."""
    recipe = check_section(TuneRecipe, read_values(path, overrides), f"recipe {path}")
    recipe.check_choices()
    # epochs alone do not tell the steps: then warm-up and decay are assumed to fit
    scheduled = recipe.schedule.warmup_steps + recipe.schedule.decay_steps
    recipe.schedule.build(recipe.train.steps or max(1, scheduled))
    recipe.build_method().callbacks(max(1, recipe.train.steps), lambda line: None)
    config = checkpoint.read_config(recipe.model)
    if recipe.data.row_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"data.row_tokens {recipe.data.row_tokens} exceeds the model's "
            f"{config.max_position_embeddings} positions; an example may fill a whole row"
        )
    if read_json(checkpoint.locate(recipe.model) / "config.json").get("quantization_config"):
        raise ConfigError(
            f"model: {recipe.model} is quantised and cannot be trained; tune the checkpoint it was "
            "made from. Its adapter can then be served on either"
        )
    return recipe
