"""SnapMLA's FP8 latent attention in plain PyTorch: the specification of the fast kernels.

SnapMLA (arXiv:2602.10718). A token's latent c_j [C] is stored as E4M3 codes with one scale, its
rotary key k_j [R] in bfloat16, divided by that same scale, so that one factor serves both:

    s_j = max|c_j| / 448;   c8_j = E4M3(c_j / s_j);   r_j = BF16(k_j / s_j)            (eq. 6)

Queries likewise, per token and head, the scale taken over the C absorbed dims. A score needs one
multiplication after products of codes:

    z_ij = (q8_i . c8_j + qr_i . r_j) * sq_i * s_j * scale

Values are the same latents. Their scales lie on the axis that is summed over, so they join the
probabilities, which are quantised per row and block of 64 keys; that block's scale s' lives in the
state of the online softmax (m, s, L, Acc) and never returns to codes already made:

    e_j = exp(z_j - m');  f_j = e_j s_j;  s' = max f / 448;  p8_j = E4M3(f_j / s')
    beta = exp(m - m') s / s';  Acc = Acc beta + p8 . c8;  L = L beta + sum e / s'
    o = Acc / L;  lse = m + ln(L s)

Left open by the paper and decided here: a latent or block of zeros has scale 1 (a tiny scale would
blow its rotary key up); parts of a context are merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0  # of E4M3
SMALLEST = 1e-26  # a nonzero maximum is taken to be at least this
BLOCK = 64  # keys whose probabilities share a scale


def round_e4m3(x: Tensor) -> Tensor:
    """x rounded to the nearest E4M3 number, ties to even, saturating; same dtype."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


def scale_of(largest: Tensor) -> Tensor:
    """The scale that takes `largest` >= 0 to 448; 1 where it is zero."""
    return torch.where(largest == 0, 1.0, largest.clamp_min(SMALLEST) / LARGEST)


def quantize(latent: Tensor, rope: Tensor, rope8: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token quantisation of latents [..., C] and rotary keys [..., R], or of queries.

    rope8: the paper's configuration A, one scale over all C + R numbers and the rotary part in E4M3
    too. Returns codes (uint8) [..., C], scales float32 [...], rotary part bfloat16 [..., R] divided
    by the scale.
    """
    latent, rope = latent.float(), rope.float()
    largest = latent.abs().amax(-1)
    if rope8:
        largest = torch.maximum(largest, rope.abs().amax(-1))
    return quantize_by(latent, rope, scale_of(largest), rope8)


def quantize_by(
    latent: Tensor, rope: Tensor, scales: Tensor, rope8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize`, with given scales [...]."""
    codes = (latent / scales[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    aligned = rope / scales[..., None]
    if rope8:
        aligned = round_e4m3(aligned)
    return codes.view(torch.uint8), scales, aligned.bfloat16()


def values_of(codes: Tensor) -> Tensor:
    """The numbers that E4M3 codes (uint8) stand for, float32."""
    return codes.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Keys:
    """One sequence's stored tokens: codes uint8 [L, C], scales float32 [L], rope bfloat16 [L, R],
    divided by the scales."""

    codes: Tensor
    scales: Tensor
    rope: Tensor

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, part: slice) -> Keys:
        return Keys(self.codes[part], self.scales[part], self.rope[part])

    def dequantize(self) -> Tensor:
        """Latents and rotary keys, float32 [L, C + R]: what the codes stand for."""
        both = torch.cat([values_of(self.codes), self.rope.float()], dim=-1)
        return both * self.scales[:, None]


def decode(
    q8: Tensor,
    q_scales: Tensor,
    q_rope: Tensor,
    values: Tensor,
    scales: Tensor,
    rope: Tensor,
    scale: float,
    visible: Tensor,
    *,
    block: int = BLOCK,
    quantize_p: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over quantised keys, block after block, in the dtype of `values`.

    q8 [n, H, C], q_scales [n, H], q_rope [n, H, R]: numbers of the codes, not yet scaled. values
    [L, C], scales [L], rope [L, R] likewise. visible: int64 [n], keys that a query sees, a prefix.
    quantize_p: False leaves probabilities exact. Returns o [n, H, C] and lse [n, H], natural
    logarithm; zeros and -inf for a query that sees nothing.
    """
    n, heads, _ = q8.shape
    m = q8.new_full((n, heads), -math.inf)
    s, mass = torch.ones_like(m), torch.zeros_like(m)
    out = torch.zeros_like(q8)
    for first in range(0, values.shape[0], block):
        c, k, sj = (x[first : first + block] for x in (values, rope, scales))
        z = torch.einsum("nhc,kc->nhk", q8, c) + torch.einsum("nhr,kr->nhk", q_rope, k)
        z = z * (q_scales * scale)[..., None] * sj
        hidden = torch.arange(first, first + len(c), device=z.device)[None] >= visible[:, None]
        z = z.masked_fill(hidden[:, None], -math.inf)
        top = torch.maximum(m, z.amax(-1))
        base = torch.where(top == -math.inf, 0.0, top)
        e = torch.exp(z - base[..., None])
        f = e * sj
        if quantize_p:
            fresh = scale_of(f.amax(-1))
            p = round_e4m3(f / fresh[..., None])
        else:
            fresh, p = torch.ones_like(s), f
        beta = torch.exp(m - base) * s / fresh
        out = out * beta[..., None] + torch.einsum("nhk,kc->nhc", p, c)
        mass = mass * beta + e.sum(-1) / fresh
        m, s = top, fresh
    empty = mass == 0
    o = torch.where(empty[..., None], 0.0, out / torch.where(empty, 1.0, mass)[..., None])
    return o, torch.where(empty, -math.inf, m + torch.log(mass * s))


def combine(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge parts of a context: o_i [n, H, C] and lse_i [n, H], weighted by exp(lse_i)."""
    stacked = torch.stack(list(lses))
    top = stacked.amax(0)
    base = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(stacked - base)
    total = weights.sum(0)
    o = torch.einsum("pnh,pnhc->nhc", weights, torch.stack(list(outputs)))
    o = torch.where(
        (total == 0)[..., None], 0.0, o / torch.where(total == 0, 1.0, total)[..., None]
    )
    return o, base + torch.log(total)


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    keys: Keys,
    scale: float,
    *,
    rope8: bool = False,
    block: int = BLOCK,
    splits: int = 1,
    quantize_p: bool = True,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last n tokens of `keys`: q_latent [n, H, C], q_rope [n, H, R].

    splits: parts of the context, in whole blocks, that are computed apart and merged. Returns
    (o float32 [n, H, C], lse float32 [n, H]).
    """
    codes, q_scales, q_aligned = quantize(q_latent, q_rope, rope8)
    n, length = q_latent.shape[0], len(keys)
    visible = torch.arange(length - n + 1, length + 1, device=q_latent.device)
    size = max(block, -(-length // (splits * block)) * block)
    parts = []
    for first in range(0, max(length, 1), size):
        part = keys[first : first + size]
        parts.append(
            decode(
                values_of(codes), q_scales, q_aligned.float(),
                values_of(part.codes), part.scales, part.rope.float(),
                scale, visible - first, block=block, quantize_p=quantize_p,
            )
        )  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    return combine([o for o, _ in parts], [lse for _, lse in parts])


def gather(codes: Tensor, scales: Tensor, rope: Tensor, table: Tensor, length: int) -> Keys:
    """One sequence's first `length` tokens from caches [B, S, C], [B, S], [B, S, R]."""
    blocks = table[: -(-length // codes.shape[1])].long()
    return Keys(*(cache[blocks].flatten(0, 1)[:length] for cache in (codes, scales, rope)))


def write(
    latent: Tensor,
    k_rope: Tensor,
    slots: Tensor,
    codes: Tensor,
    scales: Tensor,
    rope: Tensor,
    rope8: bool = False,
) -> None:
    """Quantise latent [T, C] and k_rope [T, R] and store them at `slots` int64 [T] of caches
    [B, S, C], [B, S], [B, S, R]; negative slots are skipped."""
    kept = slots >= 0
    block, offset = slots[kept] // codes.shape[1], slots[kept] % codes.shape[1]
    made = quantize(latent[kept], k_rope[kept], rope8)
    for cache, rows in zip((codes, scales, rope), made, strict=True):
        cache[block, offset] = rows


def fetch(codes: Tensor, scales: Tensor, rope: Tensor, table: Tensor, length: int) -> Tensor:
    """One sequence's latents and rotary keys, dequantised: float32 [length, C + R]."""
    return gather(codes, scales, rope, table, length).dequantize()


def paged_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    codes: Tensor,
    scales: Tensor,
    rope: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    rope8: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attend` for packed queries [T, H, C] and [T, H, R] over paged caches; tables, lengths and
    starts as in `serval.kernels.paged_attention`. Returns o [T, H, C] and lse [T, H], float32."""
    out = torch.zeros(q_latent.shape, dtype=torch.float32, device=q_latent.device)
    lse = torch.full(q_latent.shape[:2], -math.inf, device=q_latent.device)
    starts = query_starts.tolist()
    for n, length in enumerate(context_lens.tolist()):
        mine = slice(starts[n], starts[n + 1])
        if mine.stop > mine.start:
            keys = gather(codes, scales, rope, block_tables[n], length)
            out[mine], lse[mine] = attend(q_latent[mine], q_rope[mine], keys, scale, rope8=rope8)
    return out, lse
