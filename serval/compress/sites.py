"""Where a block's activations enter its matrices, and which earlier factor can absorb a scale.

An input site is one activation [T, K] together with every matrix that reads it. Dividing what
produces channel j by s_j and multiplying column j of every reader by s_j leaves the block's
function unchanged:

    (X diag(s)^-1) (W diag(s))^T = X W^T

Equalization (FPTQ, AWQ, SmoothQuant), outlier injection and the folding of norm gains before a
rotation are all this one step. Producers are a norm's gain; the rows of `up_proj` for `down_proj`
(silu(gate) * up is linear in up); the value rows for `o_proj`, where each query head has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from serval.models.attention import GroupedQueryAttention, LatentAttention
from serval.models.decoder import ShortcutBlock, StandardBlock
from serval.models.feedforward import GatedMLP
from serval.models.layers import RMSNorm
from serval.models.moe import MixtureOfExperts


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the activation.

    name: its path in the block; for an expert stack that of the parameter
    (`mlp.experts.gate_up_proj`). weight: [..., N, K], columns are input channels. quantised: False
    for routers, which stay in float.
    """

    name: str
    weight: Tensor
    quantised: bool = True


@dataclass(frozen=True)
class Producer:
    """A factor that scales channels of the activation; `shape` is how a scale [K] broadcasts."""

    tensor: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class InputSite:
    """One activation of a block and all that reads it.

    name: path in the block of the norm or of the matrix whose input this is. width: K. norm: the
    norm that produces it, if one does. producers: what `fold` divides; empty when nothing can
    absorb a scale, for the reason in `stuck`.
    """

    name: str
    width: int
    readers: list[Reader]
    norm: RMSNorm | None = None
    producers: list[Producer] = field(default_factory=list)
    stuck: str = ""

    @property
    def foldable(self) -> bool:
        return bool(self.producers)

    @torch.no_grad()
    def fold(self, scale: Tensor) -> None:
        """Divide channel j of the activation by scale[j] ([K], positive) and multiply the readers'
        columns by it, in place; computed in float64 and rounded once to each weight's dtype."""
        scale = scale.double()
        for producer in self.producers:
            wide = scale.view(producer.shape).to(producer.tensor.device)
            producer.tensor.copy_(producer.tensor.double() / wide)
        for reader in self.readers:
            reader.weight.copy_(reader.weight.double() * scale.to(reader.weight.device))


def input_sites(block: nn.Module) -> Iterator[InputSite]:
    """Every input site of a `StandardBlock` or `ShortcutBlock`, in the order of data flow. MLA's
    kv_b_proj, whose weight the memory reads, belongs to none."""
    if isinstance(block, ShortcutBlock):
        for i in range(2):
            norm, attention = block.input_layernorm[i], block.self_attn[i]
            yield from _attention_sites(attention, f"self_attn.{i}", norm, f"input_layernorm.{i}")
            readers, inner, stuck = _mlp(block.mlps[i], f"mlps.{i}")
            if i == 0:
                more, sites, stuck = _mlp(block.mlp, "mlp")
                readers, inner = [*readers, *more], [*inner, *sites]
            name = f"post_attention_layernorm.{i}"
            yield _norm_site(name, block.post_attention_layernorm[i], readers, stuck)
            yield from inner
        return
    if not isinstance(block, StandardBlock):
        raise TypeError(f"expected a decoder block, got {type(block).__name__}")
    yield from _attention_sites(
        block.self_attn, "self_attn", block.input_layernorm, "input_layernorm"
    )
    readers, inner, stuck = _mlp(block.mlp, "mlp")
    name = "post_attention_layernorm"
    yield _norm_site(name, block.post_attention_layernorm, readers, stuck)
    yield from inner


def _reader(owner: nn.Module, path: str, leaf: str) -> Reader:
    return Reader(f"{path}.{leaf}", getattr(owner, leaf).weight)


def _norm_site(name: str, norm: nn.Module, readers: list[Reader], stuck: str = "") -> InputSite:
    assert isinstance(norm, RMSNorm)
    width = norm.weight.shape[0]
    producers = [] if stuck else [Producer(norm.weight, (width,))]
    return InputSite(name, width, readers, norm, producers, stuck)


def _attention_sites(
    attention: nn.Module, path: str, norm: nn.Module, norm_name: str
) -> Iterator[InputSite]:
    if isinstance(attention, GroupedQueryAttention):
        leaves = ("q_proj", "k_proj", "v_proj")
        yield _norm_site(norm_name, norm, [_reader(attention, path, leaf) for leaf in leaves])
        stuck, producers = "", []
        if attention.num_heads == attention.num_key_value_heads:
            width = attention.num_heads * attention.head_dim
            producers.append(Producer(attention.v_proj.weight, (width, 1)))
            if attention.v_proj.bias is not None:
                producers.append(Producer(attention.v_proj.bias, (width,)))
        else:
            stuck = "query heads share value heads"
    elif isinstance(attention, LatentAttention):
        first = "q_proj" if attention.mla.q_lora_rank is None else "q_a_proj"
        readers = [_reader(attention, path, leaf) for leaf in (first, "kv_a_proj_with_mqa")]
        yield _norm_site(norm_name, norm, readers)
        if attention.mla.q_lora_rank is not None:
            yield _norm_site(
                f"{path}.q_a_layernorm",
                attention.q_a_layernorm,
                [_reader(attention, path, "q_b_proj")],
            )
        heads, mla = attention.num_heads, attention.mla
        values = attention.kv_b_proj.weight.view(heads, -1, mla.kv_lora_rank)
        values = values[:, mla.qk_nope_head_dim :]  # [H, Dv, C]
        stuck, producers = "", [Producer(values, (heads, mla.v_head_dim, 1))]
    else:
        raise TypeError(f"{path}: expected an attention module, got {type(attention).__name__}")
    output = _reader(attention, path, "o_proj")
    width = output.weight.shape[-1]
    yield InputSite(output.name, width, [output], producers=producers, stuck=stuck)


def _mlp(mlp: nn.Module, path: str) -> tuple[list[Reader], list[InputSite], str]:
    """(readers of the layer's input, sites inside it, why its input cannot be scaled)."""
    if isinstance(mlp, GatedMLP):
        readers = [_reader(mlp, path, leaf) for leaf in ("gate_proj", "up_proj")]
        return readers, [_down_site(mlp, path)], ""
    if not isinstance(mlp, MixtureOfExperts):
        raise TypeError(f"{path}: expected a feed-forward layer, got {type(mlp).__name__}")
    experts = mlp.experts
    readers = [
        Reader(f"{path}.gate", mlp.gate.weight, quantised=False),
        Reader(f"{path}.experts.gate_up_proj", experts.gate_up_proj),
    ]
    width = experts.down_proj.shape[-1]
    down = Reader(f"{path}.experts.down_proj", experts.down_proj)
    producers, stuck = [], ""
    if experts.activation == "silu":
        producers.append(Producer(experts.gate_up_proj[:, width:], (1, width, 1)))
        if experts.gate_up_bias is not None:
            producers.append(Producer(experts.gate_up_bias[:, width:], (1, width)))
    else:
        stuck = f"activation {experts.activation!r} is not linear in up"
    sites = [InputSite(down.name, width, [down], producers=producers, stuck=stuck)]
    if mlp.shared_experts is not None:
        shared, inner, _ = _mlp(mlp.shared_experts, f"{path}.shared_experts")
        readers, sites = [*readers, *shared], [*sites, *inner]
    why = "identity experts add it to the residual stream" if mlp.moe.num_zero_experts else ""
    return readers, sites, why


def _down_site(mlp: GatedMLP, path: str) -> InputSite:
    down = _reader(mlp, path, "down_proj")
    width = down.weight.shape[-1]
    producers, stuck = [], ""
    if mlp.activation == "silu":
        producers.append(Producer(mlp.up_proj.weight, (width, 1)))
        if mlp.up_proj.bias is not None:
            producers.append(Producer(mlp.up_proj.bias, (width,)))
    else:
        stuck = f"activation {mlp.activation!r} is not linear in up"
    return InputSite(down.name, width, [down], producers=producers, stuck=stuck)
