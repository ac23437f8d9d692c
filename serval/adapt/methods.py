"""The methods of `serval tune`: what is trained, what is called at each step, what is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from serval.adapt.annealing import Anneal, Annealing
from serval.adapt.lora import LoraOptions, add_adapters
from serval.models.decoder import Decoder
from serval.train.reporting import Callback
from serval.train.sections import Positive, Section


class AdapterSection(Section):
    """See `serval.adapt.lora.LoraOptions`, and `serval.adapt.annealing.Annealing` for what
    AFA-LoRA adds: activation, and the anneal_* keys."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all"] | list[str] = "all"
    rslora: bool = False
    activation: Literal["relu", "silu", "gelu"] | None = None
    anneal_start: float | None = None
    anneal_end: float | None = None
    anneal_curve: Literal["linear", "cosine"] | None = None


class Full:
    """Every weight is trained. refused: keys of the `adapter` section that mean nothing here."""

    refused: tuple[str, ...] = tuple(AdapterSection.model_fields)
    writes_adapter = False

    def __init__(self, section: AdapterSection) -> None:
        self.section = section

    def prepare(self, decoder: Decoder) -> None:
        """Choose what is trained."""
        decoder.requires_grad_(True)

    def callbacks(self, steps: int, note: Callable[[str], None]) -> list[Callback]:
        """What acts during a run of `steps` optimizer steps."""
        return []


class Lora(Full):
    """Adapters on frozen weights."""

    refused: tuple[str, ...] = ("activation", "anneal_start", "anneal_end", "anneal_curve")
    writes_adapter = True

    @property
    def options(self) -> LoraOptions:
        """The adapter to add."""
        section = self.section
        targets = ("all",) if section.targets == "all" else tuple(section.targets)
        return LoraOptions(
            section.rank, section.alpha, section.dropout, targets, section.rslora, self.activation
        )

    @property
    def activation(self) -> str | None:
        """sigma, or None."""
        return None

    def prepare(self, decoder: Decoder) -> None:
        add_adapters(decoder, self.options)


class AfaLora(Lora):
    """Adapters whose activation fades out."""

    refused = ()

    @property
    def activation(self) -> str:
        return self.section.activation or "relu"

    def annealing(self, steps: int) -> Annealing:
        """The schedule; what the recipe leaves out has the defaults of `Annealing`."""
        section = self.section
        given = {
            "start": section.anneal_start,
            "end": section.anneal_end,
            "curve": section.anneal_curve,
        }
        chosen = {key: value for key, value in given.items() if value is not None}
        return Annealing(steps, **chosen)  # type: ignore[arg-type]

    def callbacks(self, steps: int, note: Callable[[str], None]) -> list[Callback]:
        annealing = self.annealing(steps)
        if annealing.warning is not None:
            note(f"warning: {annealing.warning}")
        return [Anneal(annealing)]
