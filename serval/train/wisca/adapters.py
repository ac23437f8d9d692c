"""Find the layers that WISCA can rescale: Serval's, those of `transformers` models, LoRA pairs.

A layer of a model not listed here is described by one function, an `AttentionAdapter`, given to
`wisca_(model, adapters=[mine, *ADAPTERS])`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from serval.models.attention import GroupedQueryAttention, LatentAttention
from serval.models.feedforward import GatedMLP
from serval.models.moe import Experts
from serval.train.wisca.pairs import Member, Pair
from serval.train.wisca.sites import (
    AttentionAdapter,
    AttentionSite,
    LatentSite,
    Projection,
    Rotary,
    Site,
    UnusableError,
)

QK_NORM = "a norm on queries and keys removes their scale"

# `model_type` of transformers models whose rotary layout was looked up. For any other, per-row
# factors of queries and keys become one per head, which is right whatever the layout.
LAYOUTS: dict[Rotary, set[str]] = {
    "half": {
        "gemma",
        "gpt_neox",
        "gpt_oss",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "stablelm",
        "starcoder2",
    },
    "interleaved": {"cohere", "cohere2", "deepseek_v2", "longcat_flash"},
    "none": {"gpt2", "opt"},
}


def _own_blocks(module: GroupedQueryAttention) -> dict[str, str]:
    blocked = {} if module.q_norm is None else {"qk": QK_NORM}
    if module.weights in ("k_bias", "kv_bias"):
        blocked["qk"] = "queries also meet a bias key, which keeps its scale"
    if module.value_gate is not None:
        blocked["vo"] = "a gate between values and output depends on their scale"
    elif module.value_bias is not None or module.weights == "kv_bias":
        blocked["vo"] = "a bias joins the values before the output and keeps its scale"
    return blocked


def serval_attention(name: str, module: nn.Module) -> Site | None:
    """Serval's own layers."""
    if isinstance(module, GroupedQueryAttention):
        return AttentionSite(
            name,
            Projection(module.q_proj),
            Projection(module.k_proj),
            Projection(module.v_proj),
            Projection(module.o_proj),
            num_heads=module.num_heads,
            num_key_value_heads=module.num_key_value_heads,
            head_dim=module.head_dim,
            v_head_dim=module.head_dim,
            rotary="interleaved" if module.interleaved else "half",
            rotary_dim=module.rotary_dim,
            blocked=_own_blocks(module),
        )
    if isinstance(module, LatentAttention):
        return _latent(name, module, module.mla, "interleaved" if module.interleaved else "half")
    return None


def _latent(name: str, module: Any, sizes: Any, rotary: Rotary | None) -> LatentSite:
    plain = getattr(module, "q_proj", None)
    return LatentSite(
        name,
        Projection(module.q_b_proj if plain is None else plain),
        Projection(module.kv_a_proj_with_mqa),
        Projection(module.kv_b_proj),
        Projection(module.o_proj),
        module.num_heads,
        sizes.qk_nope_head_dim,
        sizes.qk_rope_head_dim,
        sizes.v_head_dim,
        rotary,
        {},
    )


def transformers_attention(name: str, module: nn.Module) -> Site | None:
    """Attention layers of `transformers`, told by the names of their projections."""
    children = dict(module.named_children())
    layer: Any = module
    output = next((children[n] for n in ("o_proj", "out_proj", "dense") if n in children), None)
    if {"kv_b_proj", "kv_a_proj_with_mqa", "o_proj"} <= children.keys():
        kind, _ = _layout(layer, 0)
        interleave = getattr(getattr(layer, "config", None), "rope_interleave", None)
        if interleave is not None:
            kind = "interleaved" if interleave else "half"
        return _latent(name, module, module, kind)
    if {"q_proj", "k_proj", "v_proj"} <= children.keys() and output is not None:
        parts = [Projection(children[n]) for n in ("q_proj", "k_proj", "v_proj")]
    else:
        fused = _fused(layer, children)
        if fused is None:
            return None
        output, parts = fused
    head_dim = getattr(layer, "head_dim", getattr(layer, "head_size", None))
    if not isinstance(head_dim, int):
        raise UnusableError("it does not tell its head_dim")
    apart = parts[0].rows is None
    if apart and len({id(part.base.weight) for part in parts}) < 3:
        raise UnusableError("two of its projections are one weight")
    q, k, v = parts
    heads, kv = q.width // head_dim, k.width // head_dim
    rotary, rotary_dim = _layout(layer, head_dim)
    return AttentionSite(
        name, q, k, v, Projection(output), heads, kv, head_dim, v.width // max(kv, 1),
        rotary, rotary_dim, _blocked(layer, children),
    )  # fmt: skip


def _layout(layer: Any, head_dim: int) -> tuple[Rotary | None, int]:
    """Rotary layout by model type, and how many dimensions of a head turn."""
    config = getattr(layer, "config", None)
    model = getattr(config, "model_type", None)
    rope = getattr(config, "rope_parameters", None) or {}
    fraction = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    found = next((rotary for rotary, models in LAYOUTS.items() if model in models), None)
    return found, int(head_dim * (1.0 if fraction is None else fraction))


def _blocked(layer: Any, children: dict[str, nn.Module]) -> dict[str, str]:
    """What stands between the two sides of a pair."""
    if getattr(getattr(layer, "config", None), "clip_qkv", None) is not None:
        return dict.fromkeys(("qk", "vo"), "config.clip_qkv clips what would be scaled")
    blocked = {}
    for child, module in children.items():
        if "norm" not in type(module).__name__.lower() and "norm" not in child.lower():
            continue
        on_qk = child.startswith(("q", "k"))
        on_vo = child.startswith(("v", "o")) or "sub" in child
        if on_qk or not on_vo:
            blocked["qk"] = QK_NORM if on_qk else f"it holds an unknown norm '{child}'"
        if on_vo or not on_qk:
            blocked["vo"] = f"the norm '{child}' stands between values and output"
    return blocked


def _fused(layer: Any, children: dict[str, nn.Module]) -> tuple[nn.Module, list[Projection]] | None:
    """Output projection and q, k, v of layers that keep them in one weight; None where there is no
    such weight, UnusableError where its order is not known."""
    model = getattr(getattr(layer, "config", None), "model_type", None)
    if "query_key_value" in children and model == "gpt_neox":
        module = children["query_key_value"]
        rows = torch.arange(Projection(module).width).view(-1, 3, layer.head_size)
        return children["dense"], [Projection(module, rows[:, i].flatten()) for i in range(3)]
    if "qkv_proj" in children and model == "phi3":
        module = children["qkv_proj"]
        kv = layer.num_key_value_heads * layer.head_dim
        width = Projection(module).width
        parts = torch.arange(width).split([width - 2 * kv, kv, kv])
        return children["o_proj"], [Projection(module, part) for part in parts]
    if "c_attn" in children and model == "gpt2" and not layer.is_cross_attention:
        module = children["c_attn"]
        parts = torch.arange(Projection(module).width).chunk(3)
        return children["c_proj"], [Projection(module, part) for part in parts]
    for child in ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv"):
        if child in children:
            raise UnusableError(f"the order inside '{child}' of {type(layer).__name__} is unknown")
    return None


ADAPTERS: list[AttentionAdapter] = [serval_attention, transformers_attention]


# -- beyond attention ---------------------------------------------------------------------------


def gated_mlp(name: str, module: nn.Module) -> Pair | None:
    """up_proj against down_proj, exact because the gate alone goes through an activation."""
    if isinstance(module, (GatedMLP, Experts)) and module.activation != "silu":
        raise UnusableError(f"activation {module.activation} clamps what would be scaled")
    if isinstance(module, Experts):
        return _expert_stack(name, module)
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= children.keys():
        return None
    others = children.keys() - {"gate_proj", "up_proj", "down_proj", "act_fn", "dropout"}
    if others:
        raise UnusableError(f"it holds '{sorted(others)[0]}', unknown here")
    if getattr(getattr(module, "config", None), "swiglu_limit", None) is not None:
        raise UnusableError("config.swiglu_limit clamps what would be scaled")
    up, down = Projection(children["up_proj"]), Projection(children["down_proj"])
    units = torch.arange(up.width)
    members = [*up.output_members(units, False), *down.input_members(units, True)]
    return Pair(name, "mlp", members, {"tensor": torch.zeros_like(units)})


def _expert_stack(name: str, module: Experts) -> Pair:
    """Every expert is a tensor of its own."""
    count, _, width = module.down_proj.shape
    units = torch.arange(count * width).view(count, width)
    gates = torch.full_like(units, -1)
    up = torch.cat([gates, units], dim=1)
    members = [
        Member(module.gate_up_proj, up.view(count, 2 * width, 1), False),
        Member(module.down_proj, units.view(count, 1, width), True),
    ]
    if module.gate_up_bias is not None:
        members.append(Member(module.gate_up_bias, up, False, measured=False))
    return Pair(name, "mlp", members, {"tensor": units.flatten() // width})


@runtime_checkable
class LowRankLayer(Protocol):
    """A layer with low-rank adapters between whose two matrices it is linear at present."""

    def low_rank_pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(adapter, A [rank, in], B [out, rank]); none while something non-linear is between."""
        ...


@runtime_checkable
class AnnealedVariant(Protocol):
    """A variant of PEFT's LoRA that tells whether an adapter is a plain product B A by now."""

    def is_linear(self, module: nn.Module, adapter: str) -> bool:
        """True while nothing non-linear stands between the two matrices."""
        ...


BENT = "something non-linear stands between its two matrices at present"


def low_rank(name: str, module: nn.Module, skip: Callable[[str, str], None]) -> Iterator[Pair]:
    """A against B of every adapter of `module`: `LowRankLayer`s, and PEFT's LoRA, DoRA and
    `AnnealedVariant`s. `skip` hears name and reason of those that are left."""
    if isinstance(module, LowRankLayer):
        found = list(module.low_rank_pairs())
        if not found:
            skip(f"{name} lora", BENT)
    else:
        found = list(_peft_pairs(module, lambda adapter, why: skip(f"{name} {adapter} lora", why)))
    for adapter, a, b in found:
        units = torch.arange(a.shape[0])
        members = [Member(b, units.view(1, -1), True), Member(a, units.view(-1, 1), False)]
        yield Pair(f"{name} {adapter}", "lora", members, {"tensor": torch.zeros_like(units)})


def _peft_pairs(
    module: nn.Module, skip: Callable[[str, str], None]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    first, second = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not isinstance(first, nn.ModuleDict) or not isinstance(second, nn.ModuleDict):
        return
    variants = getattr(module, "lora_variant", {})
    for adapter in first:
        variant = variants.get(adapter)
        kind = type(variant).__name__
        a, b = first[adapter], second[adapter]
        if not isinstance(a, nn.Linear) or not isinstance(b, nn.Linear):
            skip(adapter, f"its factors are {type(a).__name__} and {type(b).__name__}, not Linear")
        elif isinstance(variant, AnnealedVariant):
            if variant.is_linear(module, adapter):
                yield adapter, a.weight, b.weight
            else:
                skip(adapter, BENT)
        elif variant is None or kind == "DoraLinearVariant":  # DoRA sees the product B A alone
            yield adapter, a.weight, b.weight
        else:
            skip(adapter, f"what {kind} does between its two matrices is not known")
