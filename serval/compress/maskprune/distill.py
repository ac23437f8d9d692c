"""Cross-entropy plus distillation from the unpruned model, without whole logits.

    loss_i = w_i (-log q_i[y_i] + lambda KL(p_i || q_i)),    q = softmax(W h), p = softmax(W h')
    dloss_i / dz_i = w_i ((1 + lambda) q_i - onehot(y_i) - lambda p_i)

with h' the teacher's, so the gradient of h is formed while a chunk of logits exists, as in
`serval.train.loss`. The head W is frozen and shared. Distillation (arXiv 1503.02531) at
temperature 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from serval.compress.maskprune.masks import MaskedDecoder
from serval.models.batch import PackedBatch
from serval.train.cpu import product
from serval.train.loss import CHUNK_ELEMENTS, chunked_cross_entropy
from serval.train.stream import Targets


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        factor: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        h, t, w = hidden.to(dtype), teacher.to(dtype), weight.to(dtype)
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        nll = torch.zeros_like(loss)
        step = max(64, CHUNK_ELEMENTS // w.shape[0])
        for start in range(0, h.shape[0], step):
            rows = slice(start, start + step)
            row_weight, target = row_weights[rows], targets[rows].unsqueeze(1)
            log_q = product(h[rows], w).float().log_softmax(-1)
            log_p = product(t[rows], w).float().log_softmax(-1)
            p = log_p.exp()
            row_nll = -log_q.gather(1, target).squeeze(1)
            divergence = (p * (log_p - log_q)).sum(1)
            nll += (row_weight * row_nll).sum()
            loss += (row_weight * (row_nll + factor * divergence)).sum()
            if grad is not None:
                slope = log_q.exp_().mul_(1 + factor).sub_(p.mul_(factor)).mul_(row_weight[:, None])
                slope.scatter_add_(1, target, -row_weight.unsqueeze(1))
                grad[rows] = product(slope.to(dtype), w.t())
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        found = None if grad is None else (grad * grads[0]).to(ctx.dtype)
        return found, None, None, None, None, None, None


def distilled_cross_entropy(
    hidden: Tensor,
    teacher: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Weighted sums over rows of the module's loss, and of the negative log-likelihood alone.

    hidden, teacher: [T, D]; weight: [V, D], the frozen head; targets: int64 [T]; row_weights:
    float32 [T]; factor: lambda. Returns float32 scalars; the first is differentiable in `hidden`.
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = row_weights.nonzero().squeeze(1)
    with torch.autocast(device, enabled=False):
        return _Distilled.apply(
            hidden[rows], teacher[rows], weight, targets[rows], row_weights[rows], factor, dtype
        )


class DistillationLoss(nn.Module):
    """`serval.train.loss.LanguageModelLoss` of a masked decoder, with its original as teacher.

    factor: lambda; 0: cross-entropy only. The validation loss is never distilled.
    """

    def __init__(self, masked: MaskedDecoder, factor: float) -> None:
        super().__init__()
        self.decoder, self.masked, self.factor = masked.decoder, masked, factor

    def forward(self, batch: Targets) -> tuple[Tensor, Tensor]:
        """Return (loss to differentiate, next-token nll), both weighted sums over the rows."""
        decoder = self.decoder
        packed = PackedBatch.from_lengths(batch.lengths, device=batch.tokens.device)
        head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
        hidden = decoder(batch.tokens, packed)
        if not (self.factor and self.training):
            return chunked_cross_entropy(hidden, head.weight, batch.targets, batch.weights)
        with torch.no_grad(), self.masked.original():
            teacher = decoder(batch.tokens, packed)
        return distilled_cross_entropy(
            hidden, teacher, head.weight, batch.targets, batch.weights, self.factor
        )
