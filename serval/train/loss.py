"""Language-model loss: linear head and cross-entropy in one pass over chunks of rows.

The logits [T, V] of a whole batch never exist. For a chunk of rows, with logits z = h W^T:

    loss_i = w_i (lse(z_i) - z_i[y_i] + c lse(z_i)^2)
    dloss_i / dz_i = w_i ((1 + 2 c lse(z_i)) softmax(z_i) - onehot(y_i))

so the gradients of h and W are formed at once, while the chunk is in cache, and the backward pass
only hands them out. c is the z-loss coefficient of PaLM (arXiv:2204.02311, section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.train.cpu import product
from serval.train.stream import Targets

# Elements of one chunk of logits: 64 MB in float32; larger is no faster.
CHUNK_ELEMENTS = 16 * 2**20


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else 8 * CHUNK_ELEMENTS
    return max(64, elements // vocabulary)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(h) if want_hidden else None
        grad_weight = torch.zeros_like(w, dtype=torch.float32) if want_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        nll = torch.zeros_like(loss)
        step = _chunk_rows(w.shape[0], h.device)
        for start in range(0, h.shape[0], step):
            rows = slice(start, start + step)
            row_weight, target = row_weights[rows], targets[rows].unsqueeze(1)
            logits = product(h[rows], w).float()  # [R, V]
            top = logits.amax(dim=1, keepdim=True)
            logits.sub_(top)
            chosen = logits.gather(1, target).squeeze(1)
            total = logits.exp_().sum(dim=1)
            lse = total.log()
            row_nll = lse - chosen
            lse = lse + top.squeeze(1)
            nll += (row_weight * row_nll).sum()
            loss += (row_weight * (row_nll + z_loss * lse * lse)).sum()
            if not (want_hidden or want_weight):
                continue
            logits.mul_((row_weight * (1 + 2 * z_loss * lse) / total).unsqueeze(1))
            logits.scatter_add_(1, target, -row_weight.unsqueeze(1))
            grad_logits = logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product(grad_logits, w.t())
            if grad_weight is not None:
                grad_weight += product(grad_logits.t(), h[rows].t())
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale).to(ctx.dtypes[0])
        if grad_weight is not None:
            # callers fold the normalisation into the row weights, so scale is nearly always 1
            if scale.is_cuda or scale.item() != 1.0:
                grad_weight = grad_weight.mul_(scale)
            grad_weight = grad_weight.to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses without whole logits.

    hidden: [T, D]; weight: [V, D], the head; targets: int64 [T]; row_weights: float32 [T].
    Returns (loss, nll), float32 scalars: sum_i w_i (nll_i + z_loss * lse_i^2), differentiable, and
    sum_i w_i nll_i, which is not. Products run in the autocast dtype when autocast is on.
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    keep = row_weights != 0
    kept = int(keep.sum())
    if kept < 0.9 * row_weights.numel():  # masked prompts: do not pay for rows that do not count
        rows = keep.nonzero().squeeze(1)
        hidden, targets, row_weights = hidden[rows], targets[rows], row_weights[rows]
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, row_weights, z_loss, dtype)


class LanguageModelLoss(nn.Module):
    """Decoder and loss as one module, so that a sharded head is gathered when the loss needs it.

    mtp_weight: factor on the mean loss of the multi-token-prediction depths (arXiv:2412.19437,
    eq. 25), used when the decoder has them.
    """

    def __init__(self, decoder: Decoder, z_loss: float = 0.0, mtp_weight: float = 0.3) -> None:
        super().__init__()
        self.decoder = decoder
        self.z_loss = z_loss
        self.mtp_weight = mtp_weight

    def forward(self, batch: Targets) -> tuple[Tensor, Tensor]:
        """Return (loss to differentiate, next-token nll), both weighted sums over the rows."""
        decoder = self.decoder
        packed = PackedBatch.from_lengths(batch.lengths, device=batch.tokens.device)
        head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
        depths = decoder.mtp if decoder.mtp is not None and self.training else None
        trunk = decoder(batch.tokens, packed, pre_norm=depths is not None)
        hidden = trunk if depths is None else decoder.norm(trunk)
        loss, nll = chunked_cross_entropy(
            hidden, head.weight, batch.targets, batch.weights, self.z_loss
        )
        for depth, module in enumerate(depths or ()):
            ahead = batch.ahead(depth)
            trunk = decoder.predict_ahead(depth, trunk, ahead.targets, packed)
            further = batch.ahead(depth + 1)
            norm: nn.Module = module.norm  # type: ignore[assignment]
            extra, _ = chunked_cross_entropy(
                norm(trunk), head.weight, further.targets, further.weights, self.z_loss
            )
            loss = loss + extra * (self.mtp_weight / len(depths or ()))
        return loss, nll
