"""Mixture of experts: router, grouped expert products, shared and zero-computation experts.

Zero-computation experts (LongCat-Flash, arXiv 2509.01322, eq. 1): MoE(x) = gamma * sum_i g_i E_i(x)
with E_i(x) = x for the identity experts; they cost no product and no memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serval import kernels
from serval.models.config import ModelConfig, MoEConfig
from serval.models.feedforward import GatedMLP, gated_activation


class Router(nn.Module):
    """Choose the top-k experts of each token; computed in float32, in float64 for such input.

    The selection bias (arXiv 2408.15664) only selects, it never enters the weights. Group-limited
    selection (DeepSeek-V3, arXiv 2412.19437): a group's score is the sum of its two best biased
    scores, and only the best `topk_group` groups take part.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.num_slots = moe.num_experts + moe.num_zero_experts
        self.weight = nn.Parameter(torch.empty(self.num_slots, hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.num_slots)) if moe.router_bias else None
        self.e_score_correction_bias: Tensor | None
        bias = torch.zeros(self.num_slots, dtype=torch.float32) if moe.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Router:
        """`module.to(bfloat16)` must not round the selection bias, whose steps are tiny."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, D] -> (weights [T, k] float32 or float64, experts int64 [T, k])."""
        moe = self.moe
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(wide)
            logits = F.linear(x.to(wide), self.weight.to(wide), bias)
            if moe.scoring == "softmax_topk":
                top, chosen = logits.topk(moe.top_k, dim=-1)
                return top.softmax(dim=-1) * moe.routed_scaling_factor, chosen
            scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
            chosen = self._select(scores.detach())
            weights = scores.gather(1, chosen)
            if moe.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return weights * moe.routed_scaling_factor, chosen

    def _select(self, scores: Tensor) -> Tensor:
        moe = self.moe
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if moe.n_group > 1:
            grouped = scores.view(-1, moe.n_group, self.num_slots // moe.n_group)
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            keep = torch.zeros_like(best, dtype=torch.bool)
            keep.scatter_(1, best.topk(moe.topk_group, dim=-1).indices, True)
            scores = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)
        return scores.topk(moe.top_k, dim=-1).indices


class Experts(nn.Module):
    """The expert stack: gate_up_proj [E, 2F, D] (gate rows first), down_proj [E, D, F]."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        count, width, hidden = moe.num_experts, moe.intermediate_size, config.hidden_size
        self.activation = config.activation
        self.parameter_splits = {"gate_up_proj": (width, width)}  # two matrices per expert
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.gate_up_bias = nn.Parameter(torch.zeros(count, 2 * width)) if moe.expert_bias else None
        self.down_bias = nn.Parameter(torch.zeros(count, hidden)) if moe.expert_bias else None

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x: [R, D] sorted by expert, counts: rows per expert. Returns [R, D]."""
        gate_up = kernels.grouped_linear(x, self.gate_up_proj, counts, self.gate_up_bias)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = gated_activation(self.activation, gate, up)
        return kernels.grouped_linear(inner, self.down_proj, counts, self.down_bias)


class MixtureOfExperts(nn.Module):
    """Router, experts, shared expert and identity experts over x: [T, D]."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.gate = Router(config.hidden_size, moe)
        self.experts = Experts(config, moe)
        shared = moe.shared_intermediate_size
        self.shared_experts = GatedMLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D] in x's dtype."""
        weights, chosen = self.gate(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        per_slot = torch.bincount(flat, minlength=self.gate.num_slots).tolist()
        counts = per_slot[: self.moe.num_experts]
        rows = order[: sum(counts)]  # identity experts sort last: their rows need no product
        token = rows // self.moe.top_k
        y = self.experts(x[token], counts)
        y = y * weights.flatten()[rows].unsqueeze(-1).to(y.dtype)
        # A token's terms are added in expert order, whatever the batch: deterministic on CPU.
        out = torch.zeros_like(x).index_add(0, token, y.to(x.dtype))
        if self.moe.num_zero_experts:
            identity = (weights * (chosen >= self.moe.num_experts)).sum(-1, keepdim=True)
            out = out + x * identity.to(x.dtype)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out
