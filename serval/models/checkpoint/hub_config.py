"""Reading and writing the keys that Hugging Face configs share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

from serval.errors import ConfigError
from serval.models.config import AttentionVariants, ModelConfig, RopeConfig

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", list: "a list"}

MAX_LAYERS = 10_000  # a damaged config.json must not build modules for minutes


class HubConfig:
    """The dict of a config.json, with typed reads whose errors name the key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        return int(self._at_least(key, self._read(key, int, default), minimum))

    def number(self, key: str, default: float | None = None, minimum: float = 1e-30) -> float:
        return float(self._at_least(key, self._read(key, float, default), minimum))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._read(key, bool, default))

    def optional(self, key: str, kind: type, minimum: int | None = None) -> Any:
        """The value, or None when the key is absent or null."""
        if self.values.get(key) is None:
            return None
        value = self._read(key, kind, None)
        return value if minimum is None else self._at_least(key, value, minimum)

    @staticmethod
    def _at_least(key: str, value: float, minimum: float) -> float:
        if not minimum <= value < math.inf:  # NaN is refused too
            wanted = "a positive number" if 0 < minimum < 1 else f"at least {minimum}"
            raise ConfigError(f"config.json: {key} is {value!r}; expected {wanted}")
        return value

    def must_be(self, key: str, *supported: Any) -> None:
        """Refuse a value that changes the model in a way Serval does not implement."""
        value = self.values.get(key)
        if value is not None and value not in supported:
            wanted = " or ".join(repr(s) for s in supported)
            raise ConfigError(f"config.json: {key} is {value!r}; Serval supports {wanted}")

    def _read(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json: {key} is missing; expected {_KINDS[kind]}")
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"config.json: {key} is {value!r}; expected {_KINDS[kind]}")
        return value

    def token_ids(self, key: str) -> Any:
        value = self.values.get(key)
        good = isinstance(value, int) or (
            isinstance(value, list) and all(isinstance(v, int) for v in value)
        )
        if value is not None and not good:
            raise ConfigError(f"config.json: {key} is {value!r}; expected token ids")
        return value


_OWN = "serval_"


def write_variants(config: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Add what config.json has no standard key for: attention that is not softmax. The model type
    then is Serval's own, so that no other reader takes the model for one with plain attention."""
    if config.attention == AttentionVariants():
        return values
    kind = _OWN + values["model_type"]
    attention = dataclasses.asdict(config.attention)
    return {**values, "model_type": kind, "architectures": [], "serval_attention": attention}


def read_variants(values: dict[str, Any]) -> tuple[dict[str, Any], AttentionVariants]:
    """The inverse of `write_variants`. Raises ConfigError for an unknown key or a bad value."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or not kind.startswith(_OWN):
        return values, AttentionVariants()
    given = values.get("serval_attention", {})
    known = {f.name for f in dataclasses.fields(AttentionVariants)}
    if not isinstance(given, dict) or set(given) - known:
        raise ConfigError(
            f"config.json: serval_attention is {given!r}; expected an object with keys of "
            f"{', '.join(sorted(known))}"
        )
    variants = AttentionVariants(**given)
    try:
        variants.check(mla=False)
    except ConfigError as error:
        raise ConfigError(f"config.json: serval_attention: {error}") from None
    return {**values, "model_type": kind.removeprefix(_OWN)}, variants


def read_common(hub: HubConfig, *, theta: float = 10000.0, eps: float = 1e-6) -> dict[str, Any]:
    """The fields of ModelConfig that are spelled alike in every family."""
    hub.must_be("hidden_act", "silu")
    if hub.integer("num_hidden_layers") > MAX_LAYERS:
        raise ConfigError(
            f"config.json: num_hidden_layers is {hub.integer('num_hidden_layers')}; expected at "
            f"most {MAX_LAYERS}"
        )
    eos = hub.token_ids("eos_token_id")
    return {
        "vocab_size": hub.integer("vocab_size"),
        "hidden_size": hub.integer("hidden_size"),
        "num_hidden_layers": hub.integer("num_hidden_layers"),
        "num_attention_heads": hub.integer("num_attention_heads"),
        "num_key_value_heads": hub.optional("num_key_value_heads", int, 1),
        "head_dim": hub.optional("head_dim", int, 1),
        "intermediate_size": hub.integer("intermediate_size"),
        "max_position_embeddings": hub.integer("max_position_embeddings"),
        "rms_norm_eps": hub.number("rms_norm_eps", eps),
        "rope": read_rope(hub, theta),
        "tie_word_embeddings": hub.flag("tie_word_embeddings"),
        "initializer_range": hub.number("initializer_range", 0.02, 0.0),
        "bos_token_id": hub.optional("bos_token_id", int),
        "eos_token_id": eos,
        "pad_token_id": hub.optional("pad_token_id", int),
    }


def write_common(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `read_common`, with the keys that say which model it is."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **write_rope(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def read_rope(hub: HubConfig, theta: float) -> RopeConfig:
    """`rope_parameters` (transformers 5) or the older `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if hub.values.get("rope_parameters") else "rope_scaling"
    values = hub.values.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise ConfigError(
            f"config.json: {key} is {values!r}; Serval supports one set of values for all layers"
        )
    params = HubConfig({f"{key}.{name}": value for name, value in values.items()})
    kind = values.get("rope_type", values.get("type")) or "default"
    if kind not in ("default", "llama3", "yarn"):
        raise ConfigError(
            f"config.json: {key}.rope_type is {kind!r}; Serval supports default, llama3 and yarn"
        )
    if params.number(f"{key}.partial_rotary_factor", 1.0) != 1.0:
        params.must_be(f"{key}.partial_rotary_factor", 1.0)
    hub.must_be("partial_rotary_factor", 1.0)
    rope = RopeConfig(
        kind=cast(Any, kind), theta=params.number(f"{key}.rope_theta", _theta(hub, theta))
    )
    if kind == "default":
        return rope
    positions = hub.integer("max_position_embeddings")
    original = params.integer(
        f"{key}.original_max_position_embeddings",
        hub.optional("original_max_position_embeddings", int, 1) or positions,
    )
    rope.original_max_position_embeddings = original
    if kind == "llama3":
        rope.factor = params.number(f"{key}.factor")
        rope.low_freq_factor = params.number(f"{key}.low_freq_factor")
        rope.high_freq_factor = params.number(f"{key}.high_freq_factor")
        return rope
    rope.factor = params.number(f"{key}.factor", positions / original)
    rope.beta_fast = params.number(f"{key}.beta_fast", 32.0)
    rope.beta_slow = params.number(f"{key}.beta_slow", 1.0)
    rope.mscale = params.optional(f"{key}.mscale", float, 0)
    rope.mscale_all_dim = params.optional(f"{key}.mscale_all_dim", float, 0)
    rope.attention_factor = params.optional(f"{key}.attention_factor", float, 0)
    rope.truncate = params.flag(f"{key}.truncate", True)
    return rope


def _theta(hub: HubConfig, default: float) -> float:
    return hub.number("rope_theta", default)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Both spellings, so that older readers understand the file too."""
    rope = config.rope
    values: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        values |= {"factor": rope.factor, "original_max_position_embeddings": original}
    if rope.kind == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values["truncate"] = rope.truncate
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(rope, name) is not None:
                values[name] = getattr(rope, name)
    return {
        "rope_parameters": {**values, "rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else values,
    }


def read_windows(hub: HubConfig, layers: int, default: list[str]) -> list[str] | None:
    """`layer_types` as Serval names them; None when no layer slides."""
    types = hub.optional("layer_types", list) or default
    short = {"full_attention": "full", "sliding_attention": "sliding"}
    for kind in types:
        if kind not in short:
            raise ConfigError(
                f"config.json: layer_types holds {kind!r}; Serval supports full_attention and "
                "sliding_attention"
            )
    if len(types) != layers:
        raise ConfigError(
            f"config.json: layer_types has {len(types)} entries; expected num_hidden_layers, "
            f"{layers}"
        )
    return [short[kind] for kind in types] if "sliding_attention" in types else None


def write_windows(config: ModelConfig) -> list[str]:
    types = config.layer_types or ["full"] * config.num_hidden_layers
    return [f"{kind}_attention" for kind in types]
