"""What a weight compression recipe implements: one file per method, one line in `RECIPES`.

For every block, in order, the pipeline (`blockwise.py`)

1. runs calibration samples through the block and gathers `statistics` of every linear input;
2. calls `prepare_block(block)`: fold scales (`site.fold(s)`), change `matrix.scheme`, look at the
   whole block's output (`block.data`). What it returns is the plan's entry of that block;
3. calls `quantize(matrix)` for each matrix whose scheme is not None, stage by stage. A matrix whose
   inputs calibration never saw (an expert no token was sent to) is rounded to nearest instead and
   reported;
4. adds what follows from the scheme alone: the scale of static activations, from the statistics as
   they are after the folds, and integer scales.

Before the first block a `Rotation` may transform the model (`ROTATIONS`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field
from rich.console import RenderableType
from torch import Tensor, nn

from serval.compress.block import Block, Matrix
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize
from serval.compress.statistics import Wanted
from serval.models.config import ModelConfig

# Of parameters; settings from the command line are checked against them.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Recipe(ABC):
    """Base of the methods: dataclasses whose fields are the method's parameters.

    default_scheme: what the command line may override. statistics: which ones `prepare_block` and
    `quantize` read; without any, no calibration runs (unless activations are static). inputs:
    "float": those the float model computes, "quantized": those the already quantised blocks before
    compute. stepwise: with "quantized" inputs, gather statistics for each stage of a block after
    the stages before it have been quantised (GPTQ's "true sequential"); `prepare_block` then has
    none. wants_data: set `block.data`. The last three may be set per instance.
    """

    default_scheme: ClassVar[WeightScheme] = WeightScheme(bits=4, group_size=128)
    statistics: ClassVar[frozenset[Wanted]] = frozenset()
    inputs: ClassVar[Literal["float", "quantized"]] = "float"
    stepwise: ClassVar[bool] = False
    wants_data: ClassVar[bool] = False

    def table(self, plan: dict[str, Any]) -> RenderableType | None:
        """How to print a plan, all blocks' entries together; None: nothing to print."""
        return None

    def prepare_block(self, block: Block) -> dict[str, Any]:
        """Change the float block before it is quantised, without changing what it computes.
        Returns what was decided, as JSON values by checkpoint name; {} for nothing."""
        return {}

    @abstractmethod
    def quantize(self, matrix: Matrix) -> QuantizedWeight:
        """The integers of `matrix.weight` in `matrix.scheme`, scales rounded to
        `matrix.scale_dtype`. `matrix.statistics` is there if `statistics` asks for any."""

    def reround(self, matrix: Matrix, scales: Tensor) -> Tensor:
        """Codes int8 [N, K] of `matrix.weight` for given scales float32 [N, G], for scales that
        were changed after `quantize` (Integer Scale's refit)."""
        assert matrix.scheme is not None
        return quantize(matrix.weight, matrix.scheme, scales=scales).codes


class Rotation(Protocol):
    """A change of basis of the whole model that leaves its function as it is, part by part, so that
    only one part is in memory at a time. Weights are float32 and changed in place."""

    def config(self, config: ModelConfig) -> ModelConfig:
        """The rotated model's config (an untied head); raises ConfigError for a model it cannot
        rotate."""
        ...

    def embedding(self, table: nn.Embedding) -> None:
        """Rotate the token embedding."""
        ...

    def block(self, block: Block) -> None:
        """Rotate a decoder block."""
        ...

    def head(self, norm: nn.Module, head: nn.Linear) -> None:
        """Rotate the final norm and the (untied) output head."""
        ...
