"""Multi-token prediction head (DeepSeek-V3, arXiv 2412.19437, section 2.2).

x_t = eh_proj [enorm(embed(token_{t+1})) ; hnorm(h_t)]; h'_t = Block(x_t); logits of token t+2 come
from the shared output head on norm(h'_t). h_t is the trunk's state before the final norm. The
embedding and the output head are shared with the trunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig
from serval.models.layers import Linear, RMSNorm


class MultiTokenPrediction(nn.Module):
    """One depth of prediction: combines a state with the next token's embedding, runs one block."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden, bias=False)
        self.block = block
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, batch: PackedBatch, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """hidden, embedded: [T, D]. Returns the block's output [T, D], before `norm`; apply `norm`,
        then the trunk's output head, for logits."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        x, residual = self.block(x, None, batch, rotary)
        return x + residual
