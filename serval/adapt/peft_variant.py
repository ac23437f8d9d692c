"""AFA-LoRA (arXiv 2512.22455) inside PEFT, for any `transformers` model.

    config = AfaLoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    model = get_afa_model(model, config)
    Trainer(model, ..., callbacks=[AfaAnnealing(model)]).train()
    save_plain_lora(model, "adapter")          # an ordinary LoRA: PEFT, vLLM, `serval serve --lora`

The equations are those of `serval.adapt.lora`. PEFT offers `LoraVariant` for this and calls it
private, so one range of versions is supported (the `adapt` extra). A checkpoint in mid-training
carries beta in adapter_config.json (`afa_beta`); stock PEFT would read such a checkpoint as a plain
LoRA with a warning only, which is right for beta 0 alone: hence `save_plain_lora`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from serval.adapt.annealing import Annealing
from serval.adapt.lora import ACTIVATIONS, annealed
from serval.errors import ConfigError, MissingExtraError

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners import lora
    from peft.tuners.lora.layer import LoraVariant
except ImportError as error:
    raise MissingExtraError("peft", "adapt") from error


@dataclass
class AfaLoraConfig(LoraConfig):
    """`peft.LoraConfig` with annealing.

    use_afa: True makes it AFA-LoRA. afa_activation: relu, silu or gelu. afa_anneal_start,
    afa_anneal_end: shares of all steps between which beta falls. afa_anneal_curve: linear or
    cosine. afa_beta: beta now; kept up to date by `set_beta`, saved and restored.
    """

    use_afa: bool = field(default=True, metadata={"is_lora_variant": True})
    afa_activation: str = "relu"
    afa_anneal_start: float = 0.0
    afa_anneal_end: float = 0.3
    afa_anneal_curve: str = "linear"
    afa_beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.afa_activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"afa_activation is {self.afa_activation!r}; choose one of: {known}")
        self.annealing(1)  # checks the shares and the curve
        others = [
            f.name
            for f in fields(LoraConfig)
            if f.metadata.get("is_lora_variant") and getattr(self, f.name)
        ]
        if self.target_parameters:
            others.append("target_parameters")
        if self.use_afa and others:
            raise ConfigError(f"AFA-LoRA does not go together with {others[0]}; choose one of them")
        register(self)

    def annealing(self, steps: int) -> Annealing:
        """The schedule of a run of `steps` optimizer steps."""
        return Annealing(steps, self.afa_anneal_start, self.afa_anneal_end, self.afa_anneal_curve)


class AfaLinear(lora.Linear):
    """PEFT's LoRA layer over `nn.Linear`, with the variant among its choices; beta per adapter."""

    afa_beta: dict[str, float]
    afa_activation: dict[str, str]
    _offers_afa = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **more: Any) -> None:
        layer: Any = base_layer
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        transposed = isinstance(base, Conv1D)  # [in, out]
        config.fan_in_fan_out = transposed
        super().__init__(
            base_layer, adapter_name, config, is_target_conv_1d_layer=transposed, **more
        )

    def resolve_lora_variant(self, *, config: Any, **more: Any) -> Any:
        # PEFT refuses a choice that the config has no field for: another adapter may be plain
        self._offers_afa = isinstance(config, AfaLoraConfig)
        return super().resolve_lora_variant(config=config, **more)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        offered = {("use_afa",): AfaVariant} if self._offers_afa else {}
        return {**super().lora_variants, **offered}


def _unsupported(target: nn.Module, adapter_name: str, config: Any, **more: Any) -> None:
    raise ConfigError(
        f"target {more.get('target_name', '?')!r} is a {type(target).__name__}; AFA-LoRA adapts "
        "nn.Linear and Conv1D layers: leave it out of target_modules, or give it a plain LoRA"
    )


class AfaVariant(LoraVariant):
    """B phi(A x), see `serval.adapt.lora`."""

    def supports_lora_conversion(self) -> bool:
        return False  # only after annealing, and then `save_plain_lora` is exact

    @staticmethod
    def init(module: Any, adapter_name: str, config: Any = None, **_: Any) -> None:
        if not hasattr(module, "afa_beta"):
            module.afa_beta, module.afa_activation = {}, {}
        module.afa_beta[adapter_name] = config.afa_beta
        module.afa_activation[adapter_name] = config.afa_activation

    @staticmethod
    def is_linear(module: Any, adapter: str) -> bool:
        """Whether the annealing is over: WISCA may then balance the two matrices."""
        return not module.afa_beta[adapter]

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        code = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        if beta := module.afa_beta[active_adapter]:
            code = annealed(code, module.afa_activation[active_adapter], beta)
        return result + module.lora_B[active_adapter](code) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _delta(module, active_adapter).to(orig_weight.dtype)


def _delta(module: Any, adapter: str) -> Tensor:
    beta = module.afa_beta[adapter]
    if beta:
        raise ConfigError(
            f"adapter {adapter!r} is still non-linear (beta = {beta:g}) and cannot be merged; "
            "train to the end of its annealing, or call set_beta(model, 0.0), which changes its "
            "outputs"
        )
    weight = module.get_base_layer().weight
    if not weight.is_floating_point():
        raise ConfigError(
            f"adapter {adapter!r} cannot be merged into a {type(module.get_base_layer()).__name__} "
            f"of {str(weight.dtype).removeprefix('torch.')} weights; merge it into the model that "
            "was quantised"
        )
    return module.get_delta_weight(adapter)


def register(config: AfaLoraConfig) -> None:
    """Tell PEFT to use `AfaLinear`. PEFT does not save this: a config that was loaded as a plain
    `LoraConfig` knows nothing of it (use `load_afa_model`)."""
    # in this order; PEFT would take its own layers, which do not know the variant, for the rest
    layers: dict[type[nn.Module], Any] = {
        nn.Linear: AfaLinear,
        Conv1D: AfaLinear,
        nn.Module: _unsupported,
    }
    config._register_custom_module(layers)


def get_afa_model(model: nn.Module, config: AfaLoraConfig, adapter: str = "default") -> PeftModel:
    """`model` with a fresh adapter; only the adapter is trained."""
    return get_peft_model(model, config, adapter_name=adapter)


def load_afa_model(model: nn.Module, directory: str | Path, trainable: bool = True) -> PeftModel:
    """`model` with an adapter that `save_pretrained` wrote in mid-training, at its own beta.

    Raises ConfigError when the directory holds no AFA-LoRA adapter.
    """
    path = Path(directory) / "adapter_config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as an adapter's configuration: {error}") from None
    if "use_afa" not in values:
        raise ConfigError(f"{path} is no AFA-LoRA adapter (no use_afa); load it with PEFT itself")
    known = {f.name for f in fields(AfaLoraConfig)}
    config = AfaLoraConfig(**{k: v for k, v in values.items() if k in known})
    config.inference_mode = not trainable
    return PeftModel.from_pretrained(model, str(directory), config=config, is_trainable=trainable)


def set_beta(model: nn.Module, beta: float, adapter: str = "default") -> None:
    """Set beta of one adapter in every layer, and in the config that is saved with it."""
    for module in model.modules():
        if isinstance(module, AfaLinear) and adapter in getattr(module, "afa_beta", {}):
            module.afa_beta[adapter] = float(beta)
    config = getattr(model, "peft_config", {}).get(adapter)
    if isinstance(config, AfaLoraConfig):
        config.afa_beta = float(beta)


class AfaAnnealing(TrainerCallback):
    """Sets beta from the global optimizer step of a `transformers.Trainer`: the same after a
    resume, on every rank, and under gradient checkpointing."""

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        config = model.peft_config[adapter]
        if not isinstance(config, AfaLoraConfig):
            raise ConfigError(f"adapter {adapter!r} is a {type(config).__name__}, no AfaLoraConfig")
        self.model, self.adapter, self.config = model, adapter, config
        late = config.annealing(1).warning
        if late is not None:
            warnings.warn(f"afa_{late}", stacklevel=2)

    def _set(self, state: Any) -> None:
        annealing = self.config.annealing(max(1, state.max_steps))
        set_beta(self.model, annealing.beta(state.global_step), self.adapter)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._set(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._set(state)  # what is evaluated or saved now belongs to the next step


def save_plain_lora(model: PeftModel, directory: str | Path, adapter: str = "default") -> Path:
    """Write an annealed adapter as an ordinary LoRA, without a trace of AFA; returns the directory.

    Raises ConfigError while beta is not exactly 0.
    """
    config = model.peft_config[adapter]
    if isinstance(config, AfaLoraConfig) and config.afa_beta:
        raise ConfigError(
            f"adapter {adapter!r} is still non-linear (beta = {config.afa_beta:g}); a plain LoRA "
            "cannot say that. Train to the end of its annealing first"
        )
    with torch.no_grad():
        model.save_pretrained(str(directory), selected_adapters=[adapter])
    where = Path(directory) if adapter == "default" else Path(directory) / adapter
    path = where / "adapter_config.json"
    own = {f.name for f in fields(AfaLoraConfig)} - {f.name for f in fields(LoraConfig)}
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in own}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return where
