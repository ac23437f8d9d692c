"""Recipes: one YAML file describes a training run.

Every key is checked before anything starts; a mistake is reported with the file, the key, what
was expected and, for an unknown key, the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from serval.data.options import DataOptions, check_options
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.config import ModelConfig
from serval.models.initialize import INITIALIZERS
from serval.optim import READS, SCHEDULES
from serval.registry import resolve
from serval.train.callbacks import CALLBACKS
from serval.train.reporting import Callback
from serval.train.sections import (
    CheckpointSection,
    NonNegative,
    OptimizerSection,
    ScheduleSection,
    Section,
    TrainSection,
    ValidationSection,
)

S = TypeVar("S", bound=BaseModel)
D = TypeVar("D")


class Run(Section):
    """What every training run has.

    output: its directory. callbacks: methods that act during training, a key of
    `serval.train.callbacks.CALLBACKS` and the fields of its class.
    """

    output: str
    seed: NonNegative = 0
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    callbacks: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    tensorboard: bool = False

    @property
    def directory(self) -> Path:
        return Path(self.output)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change when a run is resumed. Steps and schedule may: extending a run with
        a stable phase is what warm-up-stable-decay is for."""
        loose = {"output", "tensorboard", "validation", "checkpoint", "schedule"}
        values = self.model_dump(mode="json", exclude=loose)
        for key in ("steps", "log_every", "device"):
            values["train"].pop(key)
        return values

    def written(self) -> dict[str, Any]:
        """The recipe as JSON values, defaults included, that can be read as a recipe again: without
        the keys that its optimizer or schedule would refuse."""
        values = self.model_dump(mode="json")
        read = READS[self.optimizer.name] | {"name"}
        values["optimizer"] = {k: v for k, v in values["optimizer"].items() if k in read}
        read = SCHEDULES[self.schedule.name].load().reads | {"name"}
        values["schedule"] = {k: v for k, v in values["schedule"].items() if k in read}
        return values

    def build_callbacks(self) -> list[Callback]:
        """The methods under `callbacks`, in the recipe's order; raises ConfigError naming every
        wrong key."""
        return [
            check_dataclass(
                resolve(CALLBACKS, name, "callback"), options or {}, f"callbacks.{name}", "recipe"
            )
            for name, options in self.callbacks.items()
        ]

    def check_choices(self) -> None:
        """Raise ConfigError for what one section's types cannot tell: names, and numbers that must
        fit each other."""
        self.optimizer.check()
        self.build_callbacks()
        rows, share = self.train.batch_rows, self.train.micro_batch_rows
        if rows % share:
            raise ConfigError(
                f"train.batch_rows is {rows}; expected a multiple of train.micro_batch_rows {share}"
            )


class Recipe(Run):
    """One run of `serval train`.

    initializer: a key of `serval.models.initialize.INITIALIZERS`, for
    fresh weights. model: fields of `ModelConfig` (vocab_size comes from the
    tokenizer), or `path` of a checkpoint to continue from. data: see `serval.data.options`.
    """

    initializer: str = "normal"
    model: dict[str, Any]
    data: DataOptions

    def fingerprint(self) -> dict[str, Any]:
        values = super().fingerprint()
        values["data"].pop("cache")
        return values


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; raises ConfigError naming the file and every wrong key.

    overrides: "section.key=value" strings laid over the file, values written as in YAML.
    """
    values = read_values(path, overrides)
    recipe = check_section(Recipe, values, f"recipe {path}")
    _check_choices(recipe)
    config = _model_of(recipe, f"recipe {path}")
    checkpoint.choose_family(config)  # or the run would end with a model that cannot be written
    if recipe.data.row_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"data.row_tokens {recipe.data.row_tokens} exceeds model.max_position_embeddings "
            f"{config.max_position_embeddings}; a document may fill a whole row"
        )
    return recipe


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a YAML file, unchecked, with `overrides` laid over them."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not a text file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"recipe {path}: expected a mapping of sections, the file is {kind}")
    for override in overrides:
        _override(values, override)
    return values


def _check_choices(recipe: Recipe) -> None:
    recipe.check_choices()
    resolve(INITIALIZERS, recipe.initializer, "initializer")
    recipe.schedule.build(recipe.train.steps)
    check_options(recipe.data)


def _model_of(recipe: Recipe, where: str) -> ModelConfig:
    """The model that will be trained; a fresh one's vocabulary is not known yet."""
    if "path" not in recipe.model:
        return check_model({"vocab_size": 1, **recipe.model}, where)
    others = sorted(recipe.model.keys() - {"path"})
    if others:
        raise ConfigError(f"model.{others[0]}: not allowed beside model.path, which brings it")
    return checkpoint.read_config(recipe.model["path"])


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: '{section}' is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {why}") from error


def check_model(values: dict[str, Any], where: str) -> ModelConfig:
    """Build a ModelConfig from plain values; raises ConfigError naming every wrong key."""
    return check_dataclass(ModelConfig, values, "model", where)


def check_dataclass(kind: type[D], values: dict[str, Any], prefix: str, where: str) -> D:
    """Build a dataclass from plain values, the section `prefix` of a recipe; raises ConfigError
    with one line per mistake."""
    _check_known(kind, values, prefix, where)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [_describe(kind, dict(p), f"{prefix}.") for p in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def _check_known(kind: Any, values: dict[str, Any], prefix: str, where: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: {_unknown_key(f'{prefix}.{key}', key, list(fields))}")
        inner = _section_in(hints[key])
        if isinstance(value, dict) and dataclasses.is_dataclass(inner):
            _check_known(inner, value, f"{prefix}.{key}", where)


def check_section(kind: type[S], values: dict[str, Any], where: str) -> S:
    """Validate `values` as a `kind`; raises ConfigError with one line per mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_describe(kind, dict(problem)) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


_EXPECTED = {
    "int_parsing": "int",
    "int_type": "int",
    "int_from_float": "int",
    "float_parsing": "float",
    "float_type": "float",
    "bool_parsing": "bool",
    "bool_type": "bool",
    "string_type": "str",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}


def _unknown_key(key: str, last: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(last, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key '{key}' ({hint})"


def _describe(kind: Any, problem: dict[str, Any], prefix: str = "") -> str:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    key, given, sort = prefix + ".".join(location), problem["input"], problem["type"]
    if sort == "extra_forbidden":
        return _unknown_key(key, location[-1], _keys_at(kind, location[:-1]))
    if sort == "missing":
        return f"missing key '{key}'"
    if sort in _EXPECTED:
        return f"{key}: expected {_EXPECTED[sort]}, got {given!r}"
    message = problem["msg"].replace("Input should be ", "expected ")
    return f"{key}: {message}, got {given!r}"


def _keys_at(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Valid keys of the section at `location` inside `kind`."""
    current: Any = kind
    for part in location:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _section_in(fields[part].annotation)
    return list(getattr(current, "model_fields", {}))


def _section_in(annotation: Any) -> Any:
    """The section class inside an annotation such as `X | None` or `dict[str, X]`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, dict, list, tuple):
        for argument in typing.get_args(annotation):
            found = _section_in(argument)
            if isinstance(found, type) and (
                issubclass(found, BaseModel) or dataclasses.is_dataclass(found)
            ):
                return found
    return annotation
