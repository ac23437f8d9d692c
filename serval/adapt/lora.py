"""LoRA (Hu et al., arXiv 2106.09685) and AFA-LoRA (Li et al., "AFA-LoRA: Enabling Non-Linear
Adaptations in LoRA with Activation Function Annealing", arXiv 2512.22455).

    z = A dropout(x)                            A [r, d_in], B [d_out, r]
    phi(z) = beta sigma(z) + (1 - beta) z       elementwise, sigma in {ReLU, SiLU, GELU}
    y = W0 x + b + s B phi(z)                   s = alpha / r  (rsLoRA, arXiv 2312.03732: / sqrt r)

LoRA is beta = 0. AFA-LoRA starts at beta = 1 and ends at exactly 0, where the adapter is a plain
LoRA: it merges into W0 and runs wherever LoRA runs. Initialisation is LoRA's (A Kaiming-uniform,
B = 0), so the model is unchanged at step 0 for every beta; no parameter is added.

Decided here: phi is computed in float32, since under bfloat16 beta sigma(z) + (1 - beta) z loses
bits near beta = 1; at beta == 0 the plain path is taken, so that no residue remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serval.errors import ConfigError
from serval.models.decoder import Decoder
from serval.models.layers import shared_input
from serval.models.value_rotation import restore_values
from serval.optim.groups import Role

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
ALL = ("all",)
# MLA's up-projection: the cache multiplies by its weight, so nothing can be added to its output.
ABSORBED = "kv_b_proj"


@dataclass(frozen=True)
class LoraOptions:
    """The shape of an adapter.

    rank: r; alpha: s = alpha / r, with `rslora` alpha / sqrt(r). dropout: of the adapter's input.
    targets: last parts of the names of linear layers in the blocks ("q_proj"), or "all".
    activation: sigma of AFA-LoRA (a key of `ACTIVATIONS`); None is plain LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL
    rslora: bool = False
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of an adapter must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter dropout must lie in [0, 1), got {self.dropout}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"unknown activation {self.activation!r}; choose one of: {known}")

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def annealed(z: Tensor, activation: str, beta: float) -> Tensor:
    """phi(z) = beta sigma(z) + (1 - beta) z of z [..., r], in z's dtype."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return (beta * ACTIVATIONS[activation](wide) + (1.0 - beta) * wide).to(z.dtype)


class LoraLinear(nn.Module):
    """A frozen linear layer `base` [d_out, d_in] (quantised or not) with an adapter beside it.

    beta: share of the non-linear part, 0.0 unless `options.activation` is set; change it with
    `set_beta`. enabled: False gives the base model, exactly, for every beta.
    """

    parameter_roles = {  # noqa: RUF012
        "lora_A": Role.LOW_RANK_FACTOR,
        "lora_B": Role.LOW_RANK_FACTOR,
    }

    def __init__(self, base: nn.Module, options: LoraOptions) -> None:
        super().__init__()
        d_in, d_out = features(base)
        at, kind = device_of(base), torch.float32
        self.base = base.requires_grad_(False)
        self.options = options
        self.lora_A = nn.Parameter(torch.empty(options.rank, d_in, device=at, dtype=kind))
        self.lora_B = nn.Parameter(torch.zeros(d_out, options.rank, device=at, dtype=kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        self.scaling = options.scaling
        self.beta = 0.0 if options.activation is None else 1.0
        self.enabled = True

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.lora_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        return self._add(self.base(x), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.enabled:
            return y
        code = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)
        if self.beta:
            assert self.options.activation is not None
            code = annealed(code, self.options.activation, self.beta)
        return (y + F.linear(code, self.lora_B) * self.scaling).to(y.dtype)

    @staticmethod
    def together(modules: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        """All outputs of one input; the bases may share work (`models.layers.shared_input`)."""
        bases = shared_input(x, *(module.base for module in modules))
        return [module._add(y, x) for module, y in zip(modules, bases, strict=True)]

    def low_rank_pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The matrices that WISCA may balance: (name, A, B), none while beta is not 0."""
        if not self.beta:
            yield "adapter", self.lora_A, self.lora_B

    def merged(self) -> nn.Module:
        """`base` with W0 + s B A in place of W0, rounded once. Raises ConfigError while beta is not
        exactly 0, and for a base without float weights."""
        if self.beta:
            raise ConfigError(
                f"this adapter is still non-linear (beta = {self.beta:g}) and cannot be merged; "
                "train to the end of its annealing, or force it linear, which changes its outputs"
            )
        weight = self.base.weight if isinstance(self.base, nn.Linear) else None
        if weight is None or not weight.is_floating_point():
            raise ConfigError(
                f"an adapter cannot be merged into {type(self.base).__name__}, which has no float "
                "weights; merge into the checkpoint it was quantised from, then quantise that"
            )
        with torch.no_grad():
            wide = torch.promote_types(weight.dtype, torch.float32)
            delta = (self.lora_B.to(wide) @ self.lora_A.to(wide)) * self.scaling
            self.base.weight = nn.Parameter(
                (weight.to(wide) + delta).to(weight.dtype), requires_grad=False
            )
        return self.base

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, beta={self.beta:g}"


def features(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of anything with the call of a linear layer."""
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def device_of(module: nn.Module) -> torch.device:
    """Where a linear layer's weights are."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return tensors[0].device if tensors else torch.device("cpu")


def adaptable(decoder: Decoder) -> dict[str, nn.Module]:
    """The linear layers of the blocks that can carry an adapter, by name in the decoder: no
    routers, no expert stacks, no output head, not MLA's kv_b_proj."""
    found = {}
    inside: list[str] = []
    for name, module in decoder.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside[-1:]):
            continue  # the base of an adapter
        linear = isinstance(module, nn.Linear) or (
            hasattr(module, "in_features") and hasattr(module, "out_features")
        )
        if linear and name.startswith("layers.") and name.rpartition(".")[2] != ABSORBED:
            found[name] = module
            inside.append(name)
    return found


def add_adapters(decoder: Decoder, options: LoraOptions) -> list[str]:
    """Freeze `decoder` and put a `LoraLinear` around each target; returns their names.

    Raises ConfigError for a target that no linear layer of the blocks is called.
    """
    linears = adaptable(decoder)
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for target in () if options.targets == ALL else options.targets:
        if target not in leaves:
            why = (
                "its weight is absorbed by the cache"
                if target == ABSORBED
                else "no linear layer of this model's blocks is called so"
            )
            raise ConfigError(
                f"adapter target {target!r}: {why}; choose from: {', '.join(leaves)}, or 'all'"
            )
    restore_values(decoder)  # adapters belong to the basis of the checkpoint
    chosen = [
        name
        for name in linears
        if options.targets == ALL or name.rpartition(".")[2] in options.targets
    ]
    decoder.requires_grad_(False)
    for name in chosen:
        if isinstance(linears[name], LoraLinear):
            raise ConfigError(f"{name} already has an adapter; merge it first")
        replace(decoder, name, LoraLinear(linears[name], options))
    return chosen


def replace(decoder: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    owner, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, module)


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted layer of `model`, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def set_beta(model: nn.Module, beta: float) -> None:
    """Set the non-linear share of every adapter that has an activation; plain ones stay linear."""
    for module in adapters(model).values():
        module.beta = float(beta) if module.options.activation is not None else 0.0


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """While entered, `model` computes exactly what it did before adapters were added (the
    reference policy of reinforcement learning)."""
    found = list(adapters(model).values())
    before = [module.enabled for module in found]
    for module in found:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(found, before, strict=True):
            module.enabled = enabled


def merge(decoder: Decoder, *, force_linear: bool = False) -> list[str]:
    """Merge every adapter into its base, in place; returns the layers' names.

    force_linear: set beta to 0 first, which changes outputs by s B beta (sigma(z) - z). Raises
    ConfigError, before anything is changed, while an adapter is non-linear or its base quantised.
    """
    found = adapters(decoder)
    if not found:
        raise ConfigError("there is no adapter to merge: this model has none")
    if force_linear:
        set_beta(decoder, 0.0)
    for name, module in found.items():
        if module.beta or not isinstance(module.base, nn.Linear):
            try:
                module.merged()  # raises, saying why
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
    for name, module in found.items():
        replace(decoder, name, module.merged())
    return list(found)
