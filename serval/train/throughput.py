"""Model FLOPs per token and the measured peak they are compared with."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serval.models.decoder import Decoder
from serval.optim.groups import Role, route
from serval.train.cpu import product

# every token is multiplied once by each of these
MULTIPLIED = (Role.HIDDEN_MATRIX, Role.LOW_RANK_FACTOR, Role.HEAD, Role.ROUTER)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one training token, forward and backward, as needed by the algorithm.

    per_token: 6 per weight that multiplies a token, 4 if it is frozen. per_pair: per (query, key)
    pair of a document.
    """

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, decoder: Decoder) -> ModelFlops:
        """Count the products of `decoder`: matrices, head, and the experts a token is sent to."""
        moe = decoder.config.moe
        active = 0.0
        for named in route(decoder, frozen=True):
            size = named.parameter.numel() * (6 if named.parameter.requires_grad else 4)
            if named.role in MULTIPLIED:
                active += size
            elif named.role is Role.EXPERT_STACK and moe is not None:
                share = moe.top_k / (moe.num_experts + moe.num_zero_experts)
                active += size * share
            elif named.role is Role.EMBEDDING and decoder.lm_head is None:
                active += size
        pairs = sum(s.num_heads * (s.head_dim + s.v_head_dim) for s in decoder.attention_layers)
        return cls(per_token=float(active), per_pair=6.0 * pairs)

    def of_documents(self, lengths: Sequence[int]) -> float:
        """FLOPs of training on documents of `lengths` tokens (causal: half of all pairs)."""
        return sum(n * self.per_token + self.per_pair * n * (n + 1) / 2 for n in lengths)


@functools.cache
def measured_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product here and now, the denominator of utilisation."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    product(a, b).sum().item()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        tick = time.perf_counter()
        product(a, b)
        sync()
        best = min(best, time.perf_counter() - tick)
    return 2.0 * size**3 / best
