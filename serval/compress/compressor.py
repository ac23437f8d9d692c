"""What a weight compressor implements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from serval.compress.targets import Target
from serval.models.decoder import Decoder

Progress = Callable[[int, int, str], None]  # modules done, modules in all, the one at work


@dataclass
class CompressionReport:
    """What became of each module, by its name in the checkpoint.

    quantised: names of modules whose weights were replaced. kept: name -> why it stayed in float;
    modules without a matrix (norms) are not listed.
    """

    quantised: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


class Compressor(Protocol):
    """A method of `COMPRESSORS`: a dataclass whose fields are its parameters."""

    def compress(self, decoder: Decoder, progress: Progress | None = None) -> CompressionReport:
        """Replace modules of `decoder` in place, one at a time, and set its
        `quantization_config`. Raises CheckpointError naming a weight that is not finite."""
        ...

    @staticmethod
    def reads(group: dict[str, Any]) -> bool:
        """Whether a compressed-tensors config group describes this method's storage."""
        ...

    @staticmethod
    def empty(target: Target) -> nn.Module:
        """A module for `target` without values, ready for `load_checkpoint_tensors`."""
        ...

    @staticmethod
    def install(decoder: Decoder, target: Target, module: nn.Module) -> None:
        """Put `module` in the place of `target`."""
        ...
