"""Attention that needs no sink: what replaces softmax, and gates on values and outputs.

Survey: "Attention Sink in Transformers" (arXiv 2604.10098, section on mitigation); the formulas and
their sources are in `serval.kernels.attention_variants.reference`. Chosen by
`ModelConfig.attention` (`AttentionVariants`):

* what a head may do with mass it does not want: `softmax1`, `sink_logit` (one learned logit per
  head), `k_bias` and `kv_bias` (a learned key, and value, per head that every query sees);
* other weights: `clipped`, `softpick`, `sigmoid`, `elastic`;
* gates: on each head's output, from the block's input (`headwise`, `elementwise`: one linear;
  `conditional`, `conditional_mlp`: per head, on its slice of the input), and on values before they
  are cached (`value_gate`); a learned `value_bias`.

softmax1, sink logits, gates and the value bias run on every attention kernel and cache layout. The
others compute their weights from explicit logits, some query rows at a time, over keys and values
that the layout can hand out (`Layout.fetch`).

Decided here: bias keys carry one more learned number per head, added to their logit, without which
no finite key starts at "absent"; clipped softmax and sigmoid take T = max_position_embeddings, so
that cached decoding equals the full pass at any length.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serval.errors import ConfigError
from serval.kernels.attention_variants import reference as formulas
from serval.models.config import AttentionVariants, ModelConfig
from serval.models.layers import Linear
from serval.registry import Entry, resolve

if TYPE_CHECKING:
    from serval.models.decoder import Decoder

_HERE = "serval.models.variants"

ATTENTION_WEIGHTS: dict[str, Entry] = {
    "softmax": Entry("serval.models.attention:GroupedQueryAttention", "rows that sum to 1"),
    "softmax1": Entry(f"{_HERE}:ZeroLogit", "softmax with one more, silent logit of 0"),
    "sink_logit": Entry(f"{_HERE}:SinkLogit", "one silent logit per head, learned", "2508.10925"),
    "k_bias": Entry(f"{_HERE}:KeyBias", "a learned key per head, its value 0", "2410.10781"),
    "kv_bias": Entry(f"{_HERE}:KeyValueBias", "a learned key and value per head", "2402.17762"),
    "clipped": Entry(f"{_HERE}:Clipped", "softmax stretched and clipped to [0, 1]", "2306.12929"),
    "softpick": Entry(f"{_HERE}:Softpick", "rectified softmax, exact zeros", "2504.20966"),
    "sigmoid": Entry(f"{_HERE}:Sigmoid", "each key by itself, rows not normalised", "2409.04431"),
    "elastic": Entry(f"{_HERE}:Elastic", "softmax less a learned share per visible key"),
}

ATTENTION_GATES: dict[str, Entry] = {
    "headwise": Entry(f"{_HERE}:OutputGate", "a sigmoid per head from the input", "2505.06708"),
    "elementwise": Entry(f"{_HERE}:OutputGate", "a sigmoid per channel", "2505.06708"),
    "conditional": Entry(
        f"{_HERE}:ConditionalGate", "a sigmoid of each head's input slice", "2306.12929"
    ),
    "conditional_mlp": Entry(
        f"{_HERE}:ConditionalGate", "the same, of a small MLP of the slice", "2306.12929"
    ),
}

ABSENT = -30.0  # e^-30 of a row's mass: nothing in float32, yet with a gradient


class VariantPart(nn.Module):
    """What a variant adds to an attention module. Its bare parameters have one dimension, so that
    optimizers treat them like biases, whatever heads they hold."""

    def reset_parameters(self) -> None:
        """Values at the start of training, where they differ from the decoder's rule."""


class WeightFunction(VariantPart, ABC):
    """Attention from explicit logits; owns what is learned."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.options = config.attention
        self.num_heads = config.num_attention_heads
        self.max_tokens = config.max_position_embeddings

    @abstractmethod
    def forward(self, z: Tensor, q: Tensor, v: Tensor, scale: float) -> Tensor:
        """z [H, n, m] scaled logits, -inf where masked; q [H, n, D]; v [Hkv, m, Dv] -> o
        [H, n, Dv]."""


class LogitWeights(WeightFunction):
    """Weights that follow from the logits alone."""

    def forward(self, z: Tensor, q: Tensor, v: Tensor, scale: float) -> Tensor:
        return mix(self.weights(z), v)

    @abstractmethod
    def weights(self, z: Tensor) -> Tensor:
        """What each key counts: [H, n, m]."""


class Clipped(LogitWeights):
    """clip((1 - gamma) softmax(z) + gamma, 0, 1), gamma = -alpha / T (arXiv 2306.12929)."""

    def weights(self, z: Tensor) -> Tensor:
        return formulas.clipped_softmax(z, -self.options.alpha / self.max_tokens)


class Softpick(LogitWeights):
    """relu(e^z - 1) / sum |e^z - 1| (arXiv 2504.20966)."""

    def weights(self, z: Tensor) -> Tensor:
        return formulas.softpick(z)


class Sigmoid(LogitWeights):
    """sigmoid(z + b), b = -log T unless given (arXiv 2409.04431)."""

    def weights(self, z: Tensor) -> Tensor:
        b = self.options.sigmoid_bias
        return formulas.sigmoid(z, -math.log(self.max_tokens) if b is None else b)


class Elastic(LogitWeights):
    """relu(softmax(z)_ij + tau_h / i), i the number of visible keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tau = nn.Parameter(torch.empty(self.num_heads))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.tau, 0.0 if self.options.neutral else self.options.elastic_tau)

    def weights(self, z: Tensor) -> Tensor:
        return formulas.elastic_softmax(z, self.tau.view(-1, 1, 1).to(z.dtype))


class KeyBias(WeightFunction):
    """softmax([z; q.k' scale + c]) [v; 0] (Gu et al., arXiv 2410.10781): k' [H, D] and c [H] start
    at 0, c at `ABSENT` when neutral."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None
        self.key = nn.Parameter(torch.empty(self.num_heads * config.head_dim))
        self.logit = nn.Parameter(torch.empty(self.num_heads))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.key)
        nn.init.constant_(self.logit, ABSENT if self.options.neutral else 0.0)

    def column(self, q: Tensor, scale: float) -> Tensor:
        """The bias key's logits [H, n, 1]."""
        heads = self.key.view(self.num_heads, -1, 1).to(q.dtype)
        return q @ heads * scale + self.logit.view(-1, 1, 1).to(q.dtype)

    def forward(self, z: Tensor, q: Tensor, v: Tensor, scale: float) -> Tensor:
        return mix(formulas.k_bias(z, self.column(q, scale)), v)


class KeyValueBias(KeyBias):
    """softmax([z; q.k' scale + c]) [v; v'] (Sun et al., arXiv 2402.17762)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.value = nn.Parameter(torch.empty_like(self.key))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.value)

    def forward(self, z: Tensor, q: Tensor, v: Tensor, scale: float) -> Tensor:
        weights = formulas.k_bias(z, self.column(q, scale))
        seen = (z > float("-inf")).any(-1, keepdim=True)
        rest = (1 - weights.sum(-1, keepdim=True)) * seen
        return mix(weights, v) + rest * self.value.view(self.num_heads, 1, -1).to(v.dtype)


def weight_function(config: ModelConfig) -> WeightFunction | None:
    """What `config.attention.weights` computes from explicit logits; None: softmax kernels do."""
    kind = resolve(ATTENTION_WEIGHTS, config.attention.weights, "attention weights")
    return kind(config) if issubclass(kind, WeightFunction) else None


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights [H, n, m] over v [Hkv, m, Dv], heads of a group sharing values -> [H, n, Dv]."""
    heads, rows, keys = weights.shape
    grouped = weights.reshape(v.shape[0], -1, keys) @ v
    return grouped.view(heads, rows, -1)


class OutputGate(VariantPart):
    """o_h sigmoid(g): g = x W_g, one number per head or per channel (arXiv 2505.06708, position
    G1). Neutral: W_g = 0 and the gate doubled, so that it starts at 1."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.neutral = config.attention.neutral
        self.num_heads = config.num_attention_heads
        rows = self.num_heads * (width if config.attention.gate == "elementwise" else 1)
        self.proj = Linear(config.hidden_size, rows, bias=False)

    def reset_parameters(self) -> None:
        if self.neutral:
            nn.init.zeros_(self.proj.weight)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """o [T, H, Dv], x [T, hidden], the normed input of the block -> [T, H, Dv]."""
        gate = torch.sigmoid(self.proj(x)).view(*o.shape[:2], -1)
        return o * (2 * gate if self.neutral else gate)


class ConditionalGate(VariantPart):
    """o_h sigmoid(f(x_h)), f shared by all tokens and own to each head, on that head's slice of the
    input (arXiv 2306.12929): a linear, or a linear of a quarter of the width, relu, and a linear.
    The bias starts the gate at `gate_init`; neutral: divided by it, with a last layer of zeros."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        options, self.num_heads = config.attention, config.num_attention_heads
        width = config.hidden_size // self.num_heads  # of an input slice, whatever the head's
        self.neutral, self.initial = options.neutral, options.gate_init
        self.std = config.initializer_range
        inner = max(1, width // 4) if options.gate == "conditional_mlp" else 0
        self.up = nn.Parameter(torch.empty(self.num_heads * inner * width)) if inner else None
        self.up_bias = nn.Parameter(torch.empty(self.num_heads * inner)) if inner else None
        self.weight = nn.Parameter(torch.empty(self.num_heads * (inner or width)))
        self.bias = nn.Parameter(torch.empty(self.num_heads))

    def reset_parameters(self) -> None:
        if self.up is not None and self.up_bias is not None:
            nn.init.normal_(self.up, 0.0, self.std)
            nn.init.zeros_(self.up_bias)
        nn.init.normal_(self.weight, 0.0, 0.0 if self.neutral else self.std)
        nn.init.constant_(self.bias, formulas.gate_bias(self.initial))

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """o [T, H, Dv], x [T, hidden] -> [T, H, Dv]."""
        heads = x.view(-1, self.num_heads, x.shape[-1] // self.num_heads)
        if self.up is not None and self.up_bias is not None:
            up = self.up.view(self.num_heads, -1, heads.shape[-1])
            bias = self.up_bias.view(self.num_heads, -1)
            heads = F.relu(torch.einsum("thc,hkc->thk", heads, up) + bias)
        weight = self.weight.view(self.num_heads, -1)
        gated = formulas.conditional_gate(o, heads, weight, self.bias)
        return gated / self.initial if self.neutral else gated


class ValueGate(VariantPart):
    """sigmoid(G v) * v, before values are cached; G [Hkv Dv, Hkv Dv]. Neutral: G = 0, doubled."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.neutral = config.attention.neutral
        assert config.num_key_value_heads is not None
        size = config.num_key_value_heads * width
        self.proj = Linear(size, size, bias=False)

    def reset_parameters(self) -> None:
        if self.neutral:
            nn.init.zeros_(self.proj.weight)

    def forward(self, v: Tensor) -> Tensor:
        """v [T, Hkv, Dv] -> the same shape."""
        gate = torch.sigmoid(self.proj(v.flatten(-2))).view_as(v)
        return v * (2 * gate if self.neutral else gate)


class SinkLogit(VariantPart):
    """The sink logit of each head: learned, from 0 or, when neutral, from `ABSENT`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.neutral = config.attention.neutral
        self.logits = nn.Parameter(torch.empty(config.num_attention_heads))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logits, ABSENT if self.neutral else 0.0)

    def forward(self, q: Tensor) -> Tensor:
        """The logits [H]."""
        return self.logits


class ZeroLogit(nn.Module):
    """The sink logit of softmax1: 0 in every head."""

    def forward(self, q: Tensor) -> Tensor:
        """Zeros [H] for q [T, H, D]."""
        return q.new_zeros(q.shape[1], dtype=torch.float32)


def sink_logit(config: ModelConfig) -> nn.Module | None:
    """What gives `config.attention.weights` its sink logits, if it has any."""
    if config.attention.weights == "softmax1":
        return ZeroLogit()
    return SinkLogit(config) if config.attention.weights == "sink_logit" else None


def output_gate(config: ModelConfig, width: int) -> nn.Module | None:
    """The gate that `config.attention.gate` names, for heads of `width` channels."""
    name = config.attention.gate
    if name is None:
        return None
    gate: nn.Module = resolve(ATTENTION_GATES, name, "attention gate")(config, width)
    return gate


def require_plain(config: ModelConfig, what: str) -> None:
    """Raise `ConfigError` unless the model's attention is plain softmax, which `what` needs."""
    if config.attention != AttentionVariants():
        raise ConfigError(
            f"{what} works on softmax attention only; this model has model.attention = "
            f"{config.attention}"
        )


@torch.no_grad()
def with_variants(decoder: Decoder, variants: AttentionVariants) -> Decoder:
    """A decoder like `decoder`, sharing its weights, with `variants`; with `neutral=True` it
    computes the same until it is trained. Raises `ConfigError` for variants that do not fit, or a
    model whose attention already departs from softmax."""
    require_plain(decoder.config, "adding a variant")
    from serval.models.value_rotation import keep_basis, restore_values  # which builds on this

    restore_values(decoder)  # variants may stand between values and outputs
    config = dataclasses.replace(decoder.config, attention=variants)
    made = type(decoder)(config).to(decoder.norm.weight.device, decoder.norm.weight.dtype)
    made.load_state_dict(decoder.state_dict(), strict=False, assign=True)
    keep_basis(decoder, made)  # weights would be turned in place, under the other one
    keep_basis(made, decoder)
    return made.train(decoder.training)
