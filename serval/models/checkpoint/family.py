"""What a checkpoint family is: a translation of configs and of tensor names and layouts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from serval.errors import ConfigError
from serval.models.checkpoint.hub_config import HubConfig
from serval.models.config import ModelConfig


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint and the part of a parameter that holds it.

    `view` is a strided view of the parameter whose elements, in row order, are those of the stored
    tensor of shape `shape`.
    """

    name: str
    view: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, view: Tensor) -> Piece:
        return cls(name, view, tuple(view.shape))


class Family(ABC):
    """One checkpoint format: `model_type` in config.json, and how its tensors are named.

    The defaults store each parameter under "model." + its name and each expert apart
    (`experts.{e}.gate_proj.weight`), as most families do.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    @abstractmethod
    def read_config(self, hub: HubConfig) -> ModelConfig:
        """Translate config.json; raises ConfigError naming a key Serval cannot honour."""

    @abstractmethod
    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json for `config`."""

    def rename(self, name: str, config: ModelConfig) -> str:
        """Checkpoint name of the decoder's parameter or module `name`."""
        return name if name.startswith("lm_head") else f"model.{name}"

    def pieces(self, name: str, parameter: Tensor, config: ModelConfig) -> Iterator[Piece]:
        """The stored tensors that make up one parameter or buffer of the decoder."""
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".experts"):
            yield from self.expert_pieces(self.rename(owner, config), leaf, parameter)
        else:
            yield Piece.of(self.rename(name, config), parameter)

    def expert_pieces(self, prefix: str, leaf: str, stack: Tensor) -> Iterator[Piece]:
        """gate_up_proj [E, 2F, D] and down_proj [E, D, F], stored expert by expert."""
        if leaf not in ("gate_up_proj", "down_proj"):
            raise ConfigError(f"checkpoint family {self.model_type!r} has no experts with {leaf}")
        width = stack.shape[1] // 2
        for expert in range(stack.shape[0]):
            if leaf == "down_proj":
                yield Piece.of(f"{prefix}.{expert}.down_proj.weight", stack[expert])
                continue
            yield Piece.of(f"{prefix}.{expert}.gate_proj.weight", stack[expert, :width])
            yield Piece.of(f"{prefix}.{expert}.up_proj.weight", stack[expert, width:])

    def fit(self, config: ModelConfig, names: Iterable[str]) -> ModelConfig:
        """Adapt `config` to what the checkpoint holds (an optional head that was left out)."""
        return config

    def ignores(self, name: str, config: ModelConfig) -> bool:
        """Whether a stored tensor may be passed over: recomputed tables, a tied head's copy."""
        if name.endswith("rotary_emb.inv_freq"):
            return True
        return config.tie_word_embeddings and name == "lm_head.weight"

    def copies(self, config: ModelConfig) -> dict[str, str]:
        """Stored tensors that repeat another one: checkpoint name -> decoder parameter."""
        return {}

    def fillers(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Tensors of zeros that readers of the format insist on: checkpoint name -> shape."""
        return {}


def explain_loss(family: Family, config: ModelConfig) -> str | None:
    """What `family` cannot say of `config`, found by translating there and back; None: nothing."""
    back = family.read_config(HubConfig(family.write_config(config)))
    want, got = _comparable(config), _comparable(back)
    for key in want:
        if want[key] != got.get(key):
            return f"model.{key} = {want[key]!r}"
    return None


def _comparable(config: ModelConfig) -> dict[str, Any]:
    """The fields that matter, flattened, with equivalent spellings made equal."""
    flat: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            flat[key] = value
    drop = {"family"} | {key for key in flat if key.startswith("attention.")}  # every family's
    if flat["layer_types"] is None or "sliding" not in flat["layer_types"]:
        drop |= {"layer_types", "sliding_window"}
    if config.moe is None or all(config.moe_layers or [True]):
        drop.add("moe_layers")
    if config.moe is not None and all(config.moe_layers or [True]) and config.block == "standard":
        drop.add("intermediate_size")  # no dense layer has it
    if config.mla is not None:
        drop |= {"head_dim", "num_key_value_heads"}
    if not config.num_mtp_layers:
        drop.add("mtp_dense")
    scaled = {f"rope.{f.name}" for f in dataclasses.fields(config.rope)}
    scaled -= {"rope.kind", "rope.theta", "rope.interleaved", "rope.fraction"}
    llama3 = {"rope.low_freq_factor", "rope.high_freq_factor"}
    if config.rope.kind == "default":
        drop |= scaled
    else:
        drop |= scaled - llama3 - {"rope.factor"} if config.rope.kind == "llama3" else llama3
        original = config.rope.original_max_position_embeddings or config.max_position_embeddings
        flat["rope.original_max_position_embeddings"] = original
        drop.discard("rope.original_max_position_embeddings")
    return {key: value for key, value in flat.items() if key not in drop}
