"""The hooks by which quantised modules enter checkpoints without being named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from serval.models.checkpoint.safetensors_file import StoredTensor
from serval.models.decoder import Decoder

PRIVATE_LEAVES = (".weight_row_factor",)


@runtime_checkable
class CheckpointModule(Protocol):
    """A module that is stored as other tensors than its parameters (quantised weights).

    Names are relative to the module, for example "weight" and "weight_scale"; experts may use
    "3.gate_proj.weight". The family adds the module's own name in the checkpoint. A name that ends
    in one of `PRIVATE_LEAVES` is stored apart, where other engines do not look (`files.PRIVATE`).
    """

    def checkpoint_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor; must work on the meta device."""
        ...

    def checkpoint_tensors(self) -> Mapping[str, Tensor]:
        """The tensors to store, of the shapes and dtypes of `checkpoint_spec`; the mapping may make
        each one when it is asked for."""
        ...

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over tensors of the spec, moving or packing them. Each is read from its file when it
        is asked for, into memory of its own. Raises CheckpointError beginning with a name of the
        spec, before which the reader puts the module's."""
        ...


class Quantizer(Protocol):
    """Registered in `QUANTIZERS` under a `quant_method`; made without arguments."""

    def prepare(
        self,
        decoder: Decoder,
        quantization: dict[str, Any],
        rename: Callable[[str], str],
        stored: Mapping[str, StoredTensor],
    ) -> None:
        """Replace modules of `decoder`, which has no storage yet (meta device), by
        `CheckpointModule`s as config.json's `quantization_config` says. `rename` gives a module's
        name in the checkpoint, which is what the "ignore" and "targets" lists use. stored: every
        tensor of the checkpoint by name, for its dtype and for whether it is there. Raises
        ConfigError naming a key it cannot honour."""
        ...
