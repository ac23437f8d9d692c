"""Attention token mixers: grouped-query attention and multi-head latent attention.

Both compute projections and rotary embedding, then hand their tensors to the batch's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch import empty as torch_empty

from serval import kernels
from serval.models.batch import PackedBatch
from serval.models.config import MLAConfig, ModelConfig
from serval.models.layers import Linear, RMSNorm, shared_input, yarn_mscale
from serval.models.variants import ValueGate, output_gate, sink_logit, weight_function

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionSpec:
    """What a cache must know of one attention module; the index in `Decoder.attention_layers` is
    the `layer` that the memory receives."""

    kind: Literal["gqa", "mla"]
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    window: int | None = None
    sinks: bool = False
    weights: str = "softmax"  # `AttentionVariants.weights` where explicit logits are needed


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), with optional per-head q/k RMSNorm (Qwen3),
    biases, sliding window and learned sink logits (gpt-oss).

    values_rotated: whether v_proj and o_proj work in the basis of `models.value_rotation`.
    """

    values_rotated = False

    def __init__(self, config: ModelConfig, layer: int, index: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.index = index
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        self.window = config.window(layer)
        self.interleaved = config.rope.interleaved
        self.rotary_dim = int(self.head_dim * config.rope.fraction)
        self.scale = self.head_dim**-0.5
        hidden, bias = config.hidden_size, config.qkv_bias
        kv_width = self.num_key_value_heads * self.head_dim
        self.q_proj = Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(hidden, kv_width, bias=bias)
        self.v_proj = Linear(hidden, kv_width, bias=bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.sinks = nn.Parameter(torch_empty(self.num_heads)) if config.attention_sinks else None
        options, width = config.attention, self.num_heads * self.head_dim
        self.sink_logit = sink_logit(config)
        self.weight_function = weight_function(config)
        self.weights = "softmax" if self.weight_function is None else options.weights
        self.value_gate = ValueGate(config, self.head_dim) if options.value_gate else None
        self.value_bias = nn.Parameter(torch_empty(width)) if options.value_bias else None
        self.gate = output_gate(config, self.head_dim)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            kind="gqa",
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            window=self.window,
            sinks=self.sinks is not None or self.sink_logit is not None,
            weights=self.weights,
        )

    def forward(self, x: Tensor, batch: PackedBatch, rotary: Rotary) -> Tensor:
        """x [T, hidden], rotary: cos and sin [P, D/2] float32 -> [T, hidden], before the residual
        is added. Keys and values go through `batch.memory`."""
        q, k, v = shared_input(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(-1, self.num_heads, self.head_dim)  # [T, H, D]
        k = k.view(-1, self.num_key_value_heads, self.head_dim)
        v = v.view(-1, self.num_key_value_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rotary(q, k, *rotary, batch.positions, self.interleaved)
        if self.value_gate is not None:
            v = self.value_gate(v)
        sinks = self.sinks if self.sink_logit is None else self.sink_logit(q)
        attend, window = batch.memory.attend, self.window
        if self.weight_function is None:
            o = attend(self.index, q, k, v, self.scale, window=window, sinks=sinks)
        else:
            function = self.weight_function
            o = attend(self.index, q, k, v, self.scale, window=window, weights=function)
        if self.value_bias is not None:
            o = o + self.value_bias.view(self.num_heads, -1)
        if self.gate is not None:
            o = self.gate(o, x)
        return self.o_proj(o.flatten(-2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), optional query compression and
    LongCat-Flash's scale correction (arXiv 2509.01322, eq. 6-7).

    c_q = RMSNorm(W_DQ x); q = scale_q * W_UQ c_q; [c_kv; k_rope] = W_DKV x;
    c_kv = scale_kv * RMSNorm(c_kv); [k_nope; v] = W_UKV c_kv. k_rope is shared by all heads and not
    scaled. The memory stores the normed, scaled latent and the rotated k_rope.
    """

    def __init__(self, config: ModelConfig, mla: MLAConfig, index: int) -> None:
        super().__init__()
        self.index, self.mla = index, mla
        self.num_heads = config.num_attention_heads
        self.interleaved = config.rope.interleaved
        self.q_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        hidden, bias, heads = config.hidden_size, config.qkv_bias, self.num_heads
        if mla.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * self.q_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden, mla.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, mla.norm_eps)
            self.q_b_proj = Linear(mla.q_lora_rank, heads * self.q_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(mla.kv_lora_rank, mla.norm_eps)
        self.kv_b_proj = Linear(
            mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim), bias=False
        )
        self.o_proj = Linear(heads * mla.v_head_dim, hidden, bias=config.output_bias)
        self.gate = output_gate(config, mla.v_head_dim)
        self.scale = self.q_width**-0.5
        if config.rope.kind == "yarn" and config.rope.mscale_all_dim:
            self.scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            kind="mla",
            num_heads=self.num_heads,
            num_key_value_heads=1,
            head_dim=self.q_width,
            v_head_dim=self.mla.v_head_dim,
            kv_lora_rank=self.mla.kv_lora_rank,
            qk_rope_head_dim=self.mla.qk_rope_head_dim,
        )

    def forward(self, x: Tensor, batch: PackedBatch, rotary: Rotary) -> Tensor:
        """x [T, hidden], rotary: cos and sin [P, qk_rope_head_dim/2] float32 -> [T, hidden], before
        the residual is added. The latent goes through `batch.memory`."""
        mla = self.mla
        first = self.q_proj if mla.q_lora_rank is None else self.q_a_proj
        q, compressed = shared_input(x, first, self.kv_a_proj_with_mqa)
        if mla.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        if mla.scale_q != 1.0:
            q = q * mla.scale_q
        q_nope, q_rope = q.view(-1, self.num_heads, self.q_width).split(
            [mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1
        )
        latent, k_rope = compressed.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        if mla.scale_kv != 1.0:
            latent = latent * mla.scale_kv
        q_rope, k_rope = kernels.rotary(
            q_rope, k_rope.unsqueeze(1), *rotary, batch.positions, self.interleaved
        )
        kv_b = self.kv_b_proj.weight.view(self.num_heads, -1, mla.kv_lora_rank)
        o = batch.memory.attend_latent(
            self.index, q_nope, q_rope, latent, k_rope.squeeze(1), kv_b, self.scale
        )
        if self.gate is not None:
            o = self.gate(o, x)
        return self.o_proj(o.flatten(-2))
