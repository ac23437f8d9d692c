"""What a weight compressor implements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

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
