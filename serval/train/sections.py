"""The parts that recipes of training and of tuning share, and the checks of their keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from serval.errors import ConfigError
from serval.optim import (
    OPTIMIZERS,
    READS,
    SCHEDULES,
    OptimizerOptions,
    Role,
    RoleOptions,
    Schedule,
    build,
)
from serval.registry import resolve

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average: the share that is kept


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RoleSection(Section):
    """lr: multiplier of the learning rate. weight_decay: instead of the optimizer's."""

    lr: Factor = 1.0
    weight_decay: Factor | None = None


class OptimizerSection(Section):
    """See `serval.optim.OptimizerOptions`; `name` is a key of `serval.optim.OPTIMIZERS`.

    A key that the optimizer does not read is an error; null takes such a key back.
    """

    name: str = "adamw"
    lr: Rate = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: Factor = 0.1
    muon_lr: Rate | None = None
    momentum: Decay = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    ns_coefficients: Literal["original", "polar_express", "dion"] = "original"
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    muon_adjust: Literal["original", "match_rms_adamw", "spectral_unclamped", "update_norm"] = (
        "match_rms_adamw"
    )
    mona_alpha: Annotated[float, Field(allow_inf_nan=False)] | None = None
    mona_beta: Decay = 0.975
    roles: dict[Role, RoleSection] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_back(cls, values: Any) -> Any:
        """Leave out what is null and not read: another optimizer's key, taken back."""
        if not isinstance(values, dict):
            return values
        name = values.get("name", cls.model_fields["name"].default)
        known = cls.model_fields.keys() - {"name"}
        unread = known - READS[name] if isinstance(name, str) and name in READS else set()
        return {k: v for k, v in values.items() if v is not None or k not in unread}

    def check(self) -> None:
        """Raise ConfigError for an unknown name, for keys that the optimizer does not read, and for
        numbers that it would refuse."""
        resolve(OPTIMIZERS, self.name, "optimizer")
        for key in sorted(self.model_fields_set - READS[self.name] - {"name"}):
            readers = ", ".join(name for name in OPTIMIZERS if key in READS[name])
            raise ConfigError(
                f"optimizer.{key} means nothing to optimizer {self.name!r}; leave it out (null on "
                f"the command line), or choose one that reads it: {readers}"
            )
        try:
            build(self.name, nn.Linear(2, 2), self.options(), lambda line: None)
        except ConfigError as error:
            raise ConfigError(f"optimizer: {error}") from error

    def options(self) -> OptimizerOptions:
        """The same settings as `serval.optim.build` takes them."""
        values = self.model_dump(exclude={"name", "roles"})
        roles = {
            role: RoleOptions(section.lr, section.weight_decay)
            for role, section in self.roles.items()
        }
        return OptimizerOptions(**values, roles=roles)


class ScheduleSection(Section):
    """name: wsd, cosine or constant. Steps are optimizer steps; final: multiplier at the end.

    A key that the schedule does not read is an error; null takes such a key back.
    """

    name: str = "wsd"
    warmup_steps: NonNegative = 0
    decay_steps: NonNegative = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _take_back(cls, values: Any) -> Any:
        """Leave out what is null: taken back."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}

    def build(self, steps: int) -> Schedule:
        """The schedule of a run of `steps`; raises ConfigError if unknown or longer than it."""
        kind = resolve(SCHEDULES, self.name, "schedule")
        for key in sorted(self.model_fields_set - kind.reads - {"name"}):
            readers = ", ".join(n for n, entry in SCHEDULES.items() if key in entry.load().reads)
            raise ConfigError(
                f"schedule.{key} means nothing to schedule {self.name!r}; leave it out (null on "
                f"the command line), or choose one that reads it: {readers}"
            )
        return kind(steps, self.warmup_steps, self.decay_steps, self.final)


class TrainSection(Section):
    """The loop.

    steps: optimizer steps. batch_rows: packed rows (of data.row_tokens) in one step, over all
    processes; micro_batch_rows: rows in one forward pass. dtype: auto, float32 or bfloat16
    (autocast; weights stay float32). clip_norm: 0 switches clipping off. z_loss: coefficient of
    PaLM's z-loss. mtp_weight: of the multi-token-prediction loss.
    """

    steps: Positive
    batch_rows: Positive = 8
    micro_batch_rows: Positive = 1
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    mtp_weight: Annotated[float, Field(ge=0)] = 0.3
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    log_every: Positive = 10


class ValidationSection(Section):
    """every: steps between validations on data.validation_rows rows (0: only at the end)."""

    every: NonNegative = 0


class CheckpointSection(Section):
    """every: steps between checkpoints (0: only at the end). keep: how many to keep."""

    every: NonNegative = 500
    keep: Positive = 2
