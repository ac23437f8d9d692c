"""What is asked of a compression, checked and turned into a recipe, schemes and post-steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from serval.compress.integer_scale import IntegerScale
from serval.compress.recipe import Recipe, Rotation
from serval.compress.registry import RECIPES, ROTATIONS
from serval.compress.scheme import Activations, Scales, WeightScheme
from serval.compress.schemes import Override, SchemeRules, group_size
from serval.compress.storage import Format, check_format
from serval.compress.targets import WHY_KEPT, Target, stores_experts_apart, targets
from serval.errors import ConfigError
from serval.models.decoder import Decoder
from serval.models.moe import Experts
from serval.registry import resolve

_SCALES, _ROTATION = "scales.", "rotation."
_HEAD_GROUP = 32  # inputs that share a scale in a 4-bit head


@dataclass(kw_only=True)
class Method:
    """How weights are compressed.

    weights: a name of `RECIPES`. bits, group_size (a number or "channel"), activations, scales: of
    the scheme; None: the recipe's. head: bits of the output head (8: per row; 4: in groups of 32),
    which with a tied table is the embedding too; None: it stays in float. embedding: the same of an
    embedding of its own. ignore: patterns of checkpoint names that stay in float. overrides: see
    `Override.parse`. rotate: a name of `ROTATIONS`. format: how matrices are stored, None: packed
    for 4 bits. settings: fields of the recipe; with "scales." before it a field of `IntegerScale`,
    with "rotation." one of the rotation.
    """

    weights: str = "int8"
    bits: int | None = None
    group_size: int | str | None = None
    activations: Activations | None = None
    scales: Scales | None = None
    head: int | None = None
    embedding: int | None = None
    ignore: Sequence[str] = ()
    overrides: Sequence[str] = ()
    rotate: str | None = None
    format: Format | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> Resolved:
        """Raises ConfigError naming the option that is wrong."""
        kind = resolve(RECIPES, self.weights, "compression method")
        recipe: Recipe = make(kind, self._settings(""), f"method {self.weights!r}")
        integer = make(IntegerScale, self._settings(_SCALES), "scales")
        rotation: Rotation | None = None
        if self.rotate is not None:
            rotation_kind = resolve(ROTATIONS, self.rotate, "rotation")
            rotation = make(rotation_kind, self._settings(_ROTATION), f"rotation {self.rotate!r}")
        elif self._settings(_ROTATION):
            raise ConfigError("settings of a rotation are given, but no rotation is chosen")
        for what, bits in (("output head", self.head), ("embedding", self.embedding)):
            if bits not in (None, 4, 8):
                raise ConfigError(f"the {what} can have 4 or 8 bits, got {bits}")
        default = recipe.default_scheme
        changes: dict[str, Any] = {
            "bits": self.bits,
            "activations": self.activations,
            "scales": self.scales,
        }
        changes = {key: value for key, value in changes.items() if value is not None}
        _one_of("activations", changes, get_args(Activations))
        _one_of("scales", changes, get_args(Scales))
        if self.group_size is not None:
            changes["group_size"] = group_size(self.group_size)
        scheme = replace(default, **changes)
        rules = SchemeRules(
            scheme,
            fit=self.group_size is None,
            overrides=tuple(Override.parse(text) for text in self.overrides),
            ignore=tuple(self.ignore),
        )
        format = check_format(self.format)
        return Resolved(recipe, rules, integer, rotation, self.head, self.embedding, format)

    def _settings(self, prefix: str) -> dict[str, Any]:
        other = () if prefix else (_SCALES, _ROTATION)
        return {
            key.removeprefix(prefix): value
            for key, value in self.settings.items()
            if key.startswith(prefix) and not key.startswith(other)
        }


@dataclass
class Resolved:
    """A `Method` with its objects made."""

    recipe: Recipe
    rules: SchemeRules
    integer_scale: IntegerScale
    rotation: Rotation | None
    head: int | None
    embedding: int | None
    format: Format | None

    def schemes(self, decoder: Decoder) -> dict[str, WeightScheme | str]:
        """For every matrix of `decoder` (weights may be on the meta device) by its checkpoint name:
        its scheme, or why it stays in float. Raises ConfigError naming a matrix whose groups do not
        fit, or when all would stay in float."""
        apart = stores_experts_apart(decoder)
        tied = decoder.config.tie_word_embeddings
        if tied and self.embedding is not None:
            raise ConfigError(
                f"embedding={self.embedding}, but this model's embedding is its output head too: "
                "choose its bits with --head"
            )
        made: dict[str, WeightScheme | str] = {}
        for target in targets(decoder):
            for name in target.checkpoint_modules():
                made[name] = self._scheme(target, name, apart, tied)
        self.rules.check_used([*made, "lm_head"])
        if not any(isinstance(scheme, WeightScheme) for scheme in made.values()):
            reasons = ", ".join(sorted({str(why) for why in made.values()}))
            raise ConfigError(
                f"no matrix would be quantised: all {len(made)} stay in float ({reasons})"
            )
        return made

    def _scheme(self, target: Target, name: str, apart: bool, tied: bool) -> WeightScheme | str:
        if self.rules.ignores(name):
            return "asked for"
        if target.kind == "head" or (target.kind == "embedding" and tied):
            if self.head is None:
                table = "output head" if target.kind == "head" else "embedding and output head"
                return f"{table} (choose it with --head 8)"
            return self._table_scheme(self.head, _inputs(target, name))
        if target.kind == "embedding" and self.embedding is not None:
            return self._table_scheme(self.embedding, _inputs(target, name))
        if target.kind == "experts" and apart:
            return self.rules.scheme(name, _inputs(target, name))
        if target.kind == "linear":
            return self.rules.scheme(name, _inputs(target, name))
        return WHY_KEPT[target.kind]

    def _table_scheme(self, bits: int, inputs: int) -> WeightScheme:
        default = self.rules.default
        activations: Activations = "none" if default.activations == "none" else "token"
        if bits == 8 or inputs % _HEAD_GROUP:
            return WeightScheme(bits, activations=activations)
        return WeightScheme(4, _HEAD_GROUP, activations, default.scales)


def _one_of(key: str, values: dict[str, Any], names: tuple[str, ...]) -> None:
    if key in values and values[key] not in names:
        raise ConfigError(f"{key} is {values[key]!r}; expected one of {', '.join(names)}")


def _inputs(target: Target, name: str) -> int:
    """Columns of a target's matrix `name`."""
    module = target.module
    if isinstance(module, Experts):
        stack = module.down_proj if name.endswith("down_proj") else module.gate_up_proj
        return stack.shape[-1]
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]


def make(kind: Any, settings: dict[str, Any], what: str) -> Any:
    """`kind`, a dataclass, with its fields set; raises ConfigError naming an unknown field, or one
    whose value has the wrong type or is out of range."""
    known = [f.name for f in fields(kind) if f.init]
    hints = get_type_hints(kind, include_extras=True)
    checked = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"{what} has no setting {key!r}; it has: {', '.join(known) or 'none'}"
            )
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ConfigError(
                f"setting {key!r} of {what}: {wrong['msg']}, got {wrong['input']!r}"
            ) from error
    return kind(**checked)
