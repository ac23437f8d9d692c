"""Configuration of the decoder: one dataclass whose fields express every supported family.

Nothing here mentions a checkpoint format; `models/checkpoint/` translates Hugging Face configs into
this one and back.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from serval.errors import ConfigError


@dataclass
class RopeConfig:
    """Rotary position embedding.

    kind: "default", "llama3" (frequency-dependent interpolation of Llama 3.1) or "yarn"
    (arXiv 2309.00071). `interleaved` rotates pairs (2i, 2i+1), otherwise (i, i + R/2).
    `fraction` of the head is rotated (partial rotary). The remaining fields have the meaning of the
    Hugging Face `rope_parameters` keys of the same name.
    """

    kind: Literal["default", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    interleaved: bool = False
    fraction: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    `q_lora_rank` None means an uncompressed query projection. `scale_q` and `scale_kv` multiply the
    query and the normed latent (LongCat-Flash, arXiv 2509.01322 eq. 6-7: sqrt(hidden/rank)).
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    scale_q: float = 1.0
    scale_kv: float = 1.0
    norm_eps: float = 1e-6


@dataclass
class MoEConfig:
    """A mixture of experts.

    scoring: "softmax" and "sigmoid" score all experts, then select the top k of score + selection
    bias; "softmax_topk" selects on logits and normalises over the selected (gpt-oss).
    num_zero_experts: identity experts without weights, appended after the real ones (arXiv
    2509.01322 eq. 1). n_group/topk_group: group-limited selection of DeepSeek-V3.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid", "softmax_topk"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    shared_intermediate_size: int = 0
    selection_bias: bool = False
    num_zero_experts: int = 0
    router_bias: bool = False
    expert_bias: bool = False


_WEIGHTS = (
    "softmax",
    "softmax1",
    "sink_logit",
    "k_bias",
    "kv_bias",
    "clipped",
    "softpick",
    "sigmoid",
    "elastic",
)
_GATES = ("headwise", "elementwise", "conditional", "conditional_mlp")


@dataclass
class AttentionVariants:
    """How attention departs from softmax; see `serval.models.variants`.

    weights: what replaces softmax. gate: on each head's output. value_gate: on values, before they
    are cached. value_bias: a learned vector per head added to the output. neutral: parameters start
    where the variant is plain softmax attention, so that a trained model can be continued with it.
    alpha: of clipped softmax. sigmoid_bias: None is -log(max_position_embeddings). elastic_tau:
    its start. gate_init: where a conditional gate starts.
    """

    weights: str = "softmax"
    gate: str | None = None
    value_gate: bool = False
    value_bias: bool = False
    neutral: bool = False
    alpha: float = 4.0
    sigmoid_bias: float | None = None
    elastic_tau: float = -0.5
    gate_init: float = 0.25

    def check(self, mla: bool) -> None:
        """Raise `ConfigError` for values out of range or that do not go together."""
        for key, choices in (("weights", _WEIGHTS), ("gate", (*_GATES, None))):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"model.attention.{key} is {getattr(self, key)!r}; expected one of "
                    f"{', '.join(map(repr, choices))}"
                )
        for key in ("value_gate", "value_bias", "neutral"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(
                    f"model.attention.{key} is {getattr(self, key)!r}; expected true or false"
                )
        for key in ("alpha", "sigmoid_bias", "elastic_tau", "gate_init"):
            value = getattr(self, key)
            if not _is_finite(value) and (value is not None or key != "sigmoid_bias"):
                raise ConfigError(f"model.attention.{key} is {value!r}; expected a finite number")
        if self.alpha < 0:
            raise ConfigError(f"model.attention.alpha is {self.alpha}; expected at least 0")
        if not 0 < self.gate_init < 1:
            raise ConfigError(f"model.attention.gate_init is {self.gate_init}; expected 0 < it < 1")
        fixed = ("softmax1", "clipped", "softpick", "sigmoid")
        if self.neutral and self.weights in fixed:
            raise ConfigError(
                f"model.attention.neutral: {self.weights!r} has no parameter that could start as "
                "softmax; train it from the start"
            )
        if mla and (self.weights != "softmax" or self.value_gate or self.value_bias):
            raise ConfigError(
                "model.attention with model.mla: latent attention takes a gate only; set weights "
                "to 'softmax' and value_gate and value_bias to false"
            )


@dataclass
class ModelConfig:
    """Everything `Decoder` needs to know.

    layer_types: "full" or "sliding" per layer (None: all full). moe_layers: which layers hold the
    mixture (None: all layers if `moe` is set, none otherwise). block "shortcut" is LongCat-Flash's
    layer of two attentions, two dense FFNs and one mixture. `family` names the checkpoint family
    used by default when saving.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    moe_layers: list[bool] | None = None
    block: Literal["standard", "shortcut"] = "standard"
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_sinks: bool = False
    attention: AttentionVariants = field(default_factory=AttentionVariants)
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0
    mtp_dense: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_attention_heads"):
            _positive(f"model.{name}", getattr(self, name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check()

    def _check(self) -> None:
        for name in ("head_dim", "intermediate_size", "max_position_embeddings"):
            _positive(f"model.{name}", getattr(self, name))
        if not isinstance(self.num_hidden_layers, int) or self.num_hidden_layers < 0:
            raise ConfigError(
                f"model.num_hidden_layers must be an integer of at least 0, got "
                f"{self.num_hidden_layers!r}"
            )
        if self.mla is not None:
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                _positive(f"model.mla.{name}", getattr(self.mla, name))
        assert self.num_key_value_heads is not None
        if self.num_key_value_heads <= 0 or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        for name in ("layer_types", "moe_layers"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_hidden_layers:
                raise ConfigError(
                    f"model.{name} has {len(value)} entries for {self.num_hidden_layers} layers; "
                    "give one per layer"
                )
        if self.layer_types is not None:
            unknown = sorted(set(self.layer_types) - {"full", "sliding"})
            if unknown:
                raise ConfigError(
                    f"model.layer_types holds {unknown}; each must be 'full' or 'sliding'"
                )
            if "sliding" in self.layer_types and not self.sliding_window:
                raise ConfigError("model.layer_types has sliding layers: set model.sliding_window")
        if not isinstance(self.attention, AttentionVariants):
            raise ConfigError(
                f"model.attention is {self.attention!r}; expected an object, such as "
                "{'weights': 'softmax1'}"
            )
        self.attention.check(self.mla is not None)
        if self.attention_sinks and self.attention.weights != "softmax":
            raise ConfigError(
                "model.attention_sinks is the sink logit of gpt-oss: set model.attention.weights "
                "to 'softmax' with it"
            )
        if self.block == "shortcut" and self.moe is None:
            raise ConfigError("model.block 'shortcut' needs model.moe")
        if self.moe is not None:
            self._check_moe(self.moe)

    @staticmethod
    def _check_moe(moe: MoEConfig) -> None:
        for name in ("num_experts", "intermediate_size"):
            _positive(f"model.moe.{name}", getattr(moe, name))
        pool = moe.num_experts + moe.num_zero_experts
        if not 0 < moe.top_k <= pool:
            raise ConfigError(f"model.moe.top_k is {moe.top_k}; expected 1 to {pool} (the experts)")
        if moe.n_group < 1 or pool % moe.n_group:
            raise ConfigError(f"model.moe.n_group ({moe.n_group}) must divide {pool} experts")
        if not 0 < moe.topk_group <= moe.n_group:
            raise ConfigError(
                f"model.moe.topk_group is {moe.topk_group}; expected 1 to n_group ({moe.n_group})"
            )

    def is_moe_layer(self, layer: int) -> bool:
        if self.moe is None:
            return False
        return True if self.moe_layers is None else self.moe_layers[layer]

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer` in tokens (a query sees itself and window - 1 before it)."""
        if self.layer_types is None:
            return None
        return self.sliding_window if self.layer_types[layer] == "sliding" else None

    def eos_token_ids(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from plain values; raises ConfigError naming an unknown or missing key."""
        values = dict(values)
        for name, kind in _PARTS.items():
            if isinstance(values.get(name), dict):
                values[name] = _build(kind, values[name], f"model.{name}")
        return _build(cls, values, "model")


_PARTS = {"rope": RopeConfig, "mla": MLAConfig, "moe": MoEConfig, "attention": AttentionVariants}


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf


def _positive(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{key} must be a positive integer, got {value!r}")


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        known = ", ".join(fields)
        raise ConfigError(f"unknown key {where}.{unknown[0]}; known keys: {known}")
    missing = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise ConfigError(f"missing key {where}.{missing[0]}")
    return kind(**values)
