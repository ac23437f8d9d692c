"""Low-bit key-value caches in plain PyTorch: the specification of the fast kernels.

OScaR (arXiv:2605.19660): keys arrive rotated; n_t = |k_t| over all heads jointly, u_t = k_t / n_t;
u is quantised per channel in groups of 32 tokens, values per token in groups of 32 channels. KIVI
(arXiv:2402.02750) is the same without norms, plain per-token caches group keys like values.

Quantiser of a group, b bits, L = 2^b - 1, c = L / 2:

    s = (max - min) / L, rounded to n 2^e (see format.py)
    zero "int": z = round(-min / s), m = s (c - z)        zero "min": m = min + c s
    zero "symmetric": a the number of largest |a|, s = |a| / (c + 1/2), m = sign(a) s / 2
    m is rounded to float16; code = clamp(round((x - (m - c s)) / s), 0, L);  x ~ s (code - c) + m

z may lie outside 0..L. A constant group has s = 0 and m = its number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from serval.kernels.oscar.format import BIAS, GROUP, QuantizedKV

SMALLEST = 1e-8  # of a token's squared norm
LARGEST_HALF = 65504.0


def token_norms(k: Tensor) -> Tensor:
    """Norms [n] of rotated keys k [n, Hkv, D] over all heads and channels, at least 1e-4."""
    return k.float().square().sum((-2, -1)).clamp_min(SMALLEST).sqrt()


def parameters(x: Tensor, bits: int, zero: str, records: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale integers, middles and exponents of groups x [..., G], of which each slice of the first
    `records` axes shares an exponent.

    Returns int16 [...], float16 [...] and uint8 [the first `records` axes].
    """
    levels = 2**bits - 1
    high, low = x.amax(-1), x.amin(-1)
    farthest = torch.where(high >= -low, high, low)
    scale = (high - low) / levels if zero != "symmetric" else farthest.abs() / (levels // 2 + 1)
    most = scale.flatten(records).amax(-1)
    exponent = (torch.frexp(most).exponent - 14).clamp(-BIAS, 255 - BIAS)
    unit = torch.ldexp(torch.ones_like(most), exponent)[(..., *[None] * (scale.dim() - records))]
    n = (scale / unit).round()
    s = n * unit
    if zero == "int":
        z = (-low / s.where(s > 0, torch.ones_like(s))).round()
        middle = s * (levels / 2 - z)
    elif zero == "symmetric":
        middle = farthest.sign() * s / 2
    else:
        middle = low + s * (levels / 2)
    middle = middle.where(s > 0, (high + low) / 2).clamp(-LARGEST_HALF, LARGEST_HALF)
    stored = torch.where(most > 0, exponent + BIAS, torch.zeros_like(exponent))
    return n.to(torch.int16), middle.to(torch.float16), stored.to(torch.uint8)


def scales(n: Tensor, exponents: Tensor) -> Tensor:
    """float32 scales of integers n [..., *] and stored exponents [...]."""
    ones = torch.ones(exponents.shape, device=exponents.device)
    unit = torch.ldexp(ones, exponents.to(torch.int32) - BIAS)
    return n.float() * unit[(..., *[None] * (n.dim() - exponents.dim()))]


def codes(x: Tensor, s: Tensor, middle: Tensor, bits: int) -> Tensor:
    """uint8 codes of x with scales s and middles of its shape (or broadcast to it)."""
    levels = 2**bits - 1
    inverse = torch.where(s > 0, 1.0 / s, torch.zeros_like(s))
    return (
        ((x - (middle.float() - s * (levels / 2))) * inverse)
        .round()
        .clamp(0, levels)
        .to(torch.uint8)
    )


def pack(x: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., 32 lanes, N] into lines: uint8 [..., N * 4 * bits]; 8 / bits divides N."""
    front, n = x.shape[:-2], x.shape[-1]
    if bits == 2:
        x = x.reshape(*front, 2, 16, n // 8, 2, 4).movedim(-2, -5)  # [..., j, t, lane, line, i]
        x = x.reshape(*front, 4, 16, n // 8, 4)
    else:
        x = x.reshape(*front, 2, 16, n // 4, 4)
    planes = x.movedim(-4, 0).to(torch.int32)
    out = torch.zeros_like(planes[0])
    for plane, part in enumerate(planes):
        out |= part << (bits * plane)
    return out.transpose(-3, -2).reshape(*front, -1).to(torch.uint8)  # [..., line, lane, i]


def unpack(lines: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., 32, N]."""
    front = lines.shape[:-1]
    x = lines.reshape(*front, -1, 16, 4).transpose(-3, -2)  # [..., lane, line, i]
    count = x.shape[-2]
    planes = [(x >> (bits * p)) & (2**bits - 1) for p in range(8 // bits)]
    if bits == 4:
        return torch.stack(planes, -4).reshape(*front, 32, count * 4)
    stacked = torch.stack(planes, -4).reshape(*front, 2, 2, 16, count, 4)  # [j, t, lane, line, i]
    return stacked.movedim(-5, -2).reshape(*front, 32, count * 8)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of x [..., n] (16-bit) as uint8 [..., 2 n]."""
    return x.contiguous().view(torch.uint8)


def _put(record: Tensor, offset: int, data: Tensor) -> None:
    record[..., offset : offset + data.shape[-1]] = data


def _get(record: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return record[..., offset : offset + count * dtype.itemsize].contiguous().view(dtype)


def _grouped(x: Tensor) -> Tensor:
    """Channels in groups of 32: [..., D] -> [..., G, 32]; a short last group repeats its last
    channel, which changes neither its smallest nor its largest number."""
    short = -x.shape[-1] % GROUP
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    return x.unflatten(-1, (-1, GROUP))


def quantize(fmt: QuantizedKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Records of rotated keys k [n, Hkv, D] and values v [n, Hkv, Dv], 32 dividing n.

    Returns records uint8 [n / 32, Hkv, bytes], exponents uint8 [n / 32, Hkv, 2] and norms float32
    [n] (ones unless the format has norms).
    """
    heads = fmt.num_key_value_heads
    norms = token_norms(k) if fmt.norms else torch.ones(k.shape[0], device=k.device)
    u = k.float() * norms.reciprocal()[:, None, None]
    u = u.view(-1, GROUP, heads, fmt.head_dim).transpose(1, 2)  # [records, heads, tokens, D]
    w = v.float().view(-1, GROUP, heads, fmt.v_head_dim).transpose(1, 2)
    record = torch.zeros(*u.shape[:2], fmt.record_bytes, dtype=torch.uint8, device=k.device)
    exponents = torch.zeros(*u.shape[:2], 2, dtype=torch.uint8, device=k.device)
    at = fmt.offsets
    if fmt.keys == "channel":
        n, middle, exponents[..., 0] = parameters(u.transpose(2, 3), fmt.key_bits, fmt.zero, 2)
        s = scales(n, exponents[..., 0])
        key_codes = codes(u, s[:, :, None], middle[:, :, None], fmt.key_bits)
        scale_bytes, middle_bytes = _bytes(n), _bytes(middle)
    else:
        key_codes, scale_bytes, middle_bytes, exponents[..., 0] = _by_token(
            u, fmt.key_bits, fmt.zero
        )
    _put(record, at[0], pack(key_codes[..., : fmt.head_dim], fmt.key_bits))
    _put(record, at[1], scale_bytes)
    _put(record, at[2], middle_bytes)
    value_codes, scale_bytes, middle_bytes, exponents[..., 1] = _by_token(
        w, fmt.value_bits, fmt.zero
    )
    value_codes[..., fmt.v_head_dim :] = 0
    by_channel = value_codes.unflatten(-1, (-1, GROUP)).permute(0, 1, 3, 4, 2)
    _put(record, at[3], pack(by_channel, fmt.value_bits).flatten(2))
    _put(record, at[4], scale_bytes)
    _put(record, at[5], middle_bytes)
    return record, exponents, norms


def _by_token(x: Tensor, bits: int, zero: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [records, heads, 32, D] quantised along channels: codes [records, heads, 32, 32 G], the
    bytes of scales and middles [G, 32 tokens], exponents."""
    groups = _grouped(x)
    n, middle, exponents = parameters(groups, bits, zero, 2)  # [records, heads, tokens, G]
    s = scales(n, exponents)
    made = codes(groups, s[..., None], middle[..., None], bits).flatten(-2)
    n, middle = n.transpose(2, 3).contiguous(), middle.transpose(2, 3).contiguous()
    return made, _bytes(n).flatten(2), _bytes(middle).flatten(2), exponents


def dequantize(
    fmt: QuantizedKV, record: Tensor, exponents: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """The inverse of `quantize`: float32 k [n, Hkv, D], v [n, Hkv, Dv]."""
    at, heads = fmt.offsets, fmt.num_key_value_heads
    count = GROUP * fmt.head_dim * fmt.key_bits // 8
    k = unpack(_get(record, at[0], count, torch.uint8), fmt.key_bits).float()
    n = _get(record, at[1], fmt.key_parameters, torch.int16)
    middle = _get(record, at[2], fmt.key_parameters, torch.float16).float()
    s = scales(n, exponents[..., 0])
    if fmt.keys == "channel":
        s, middle = s[:, :, None], middle[:, :, None]
    else:
        s, middle = (_per_channel(p, fmt.head_dim) for p in (s, middle))
    k = s * (k - (2**fmt.key_bits - 1) / 2) + middle
    count = GROUP * GROUP * fmt.value_bits // 8
    lines = _get(record, at[3], fmt.value_groups * count, torch.uint8)
    v = unpack(lines.unflatten(-1, (fmt.value_groups, count)), fmt.value_bits).float()
    v = v.permute(0, 1, 4, 2, 3).flatten(3)[..., : fmt.v_head_dim]
    n = _get(record, at[4], fmt.value_groups * GROUP, torch.int16)
    middle = _get(record, at[5], fmt.value_groups * GROUP, torch.float16).float()
    s = scales(n, exponents[..., 1])
    s, middle = (_per_channel(p, fmt.v_head_dim) for p in (s, middle))
    v = s * (v - (2**fmt.value_bits - 1) / 2) + middle
    k = k.transpose(1, 2).reshape(-1, heads, fmt.head_dim) * norms[:, None, None]
    return k, v.transpose(1, 2).reshape(-1, heads, fmt.v_head_dim)


def _per_channel(p: Tensor, dim: int) -> Tensor:
    """Parameters [records, heads, G * 32 tokens] spread to [records, heads, tokens, dim]."""
    p = p.unflatten(-1, (-1, GROUP)).transpose(2, 3)
    return p.repeat_interleave(GROUP, -1)[..., :dim]


def store(fmt: QuantizedKV, k: Tensor, v: Tensor, block_ids: Tensor, storage: list[Tensor]) -> None:
    """As `serval.kernels.oscar.store`."""
    record, exponents, norms = quantize(fmt, k, v)
    per_block = storage[0].shape[2]
    blocks = block_ids.long()
    storage[0][blocks] = record.unflatten(0, (-1, per_block)).transpose(1, 2)
    storage[1][blocks] = exponents.unflatten(0, (-1, per_block)).transpose(1, 2)
    if fmt.norms:
        storage[2][blocks] = norms.view(-1, per_block * GROUP)


def fetch(
    fmt: QuantizedKV, storage: list[Tensor], block_ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """As `serval.kernels.oscar.fetch`."""
    size = storage[0].shape[2] * GROUP
    blocks = block_ids[: -(-count // size)].long()
    record = storage[0][blocks].transpose(1, 2).flatten(0, 1)
    exponents = storage[1][blocks].transpose(1, 2).flatten(0, 1)
    norms = storage[2][blocks].flatten() if fmt.norms else torch.ones(len(blocks) * size)
    k, v = dequantize(fmt, record, exponents, norms.to(record.device))
    return k[:count], v[:count]


def attend_exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query of q [T, H, D] over every key k [L, Hkv, D], v [L, Hkv, Dv], in q's dtype.

    Returns o [T, H, Dv] and lse [T, H], the log of the softmax denominator.
    """
    rows, heads, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    wide = q.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    scores = wide @ k.permute(1, 2, 0) * scale  # [Hkv, group T, L]
    lse = scores.logsumexp(-1)
    o = (scores - lse[..., None]).exp() @ v.transpose(0, 1)
    o = o.view(kv_heads, group, rows, -1).permute(2, 0, 1, 3).reshape(rows, heads, -1)
    return o, lse.view(heads, rows).T


def merge(o: Tensor, lse: Tensor, more_o: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of tokens from the parts' outputs [T, H, Dv] and lse [T, H]."""
    total = torch.logaddexp(lse, more_lse)
    base = total.where(total.isfinite(), torch.zeros_like(total))
    return o * (lse - base).exp()[..., None] + more_o * (more_lse - base).exp()[..., None], total


def attend(
    fmt: QuantizedKV,
    q: Tensor,
    storage: list[Tensor],
    block_tables: Tensor,
    stored: Tensor,
    residual_k: Tensor | None,
    residual_v: Tensor | None,
    states: Tensor | None,
    lengths: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    query_starts: Tensor | None = None,
    piece: int = 1 << 30,
    fetch: Callable[..., tuple[Tensor, Tensor]] = fetch,
) -> tuple[Tensor, Tensor]:
    """As `serval.kernels.oscar.attend`, on the dequantised cache, about `piece` tokens at a
    time."""
    starts = range(q.shape[0] + 1) if query_starts is None else query_starts.tolist()
    size = storage[0].shape[2] * GROUP
    step = -(-piece // size)  # blocks
    o = q.new_zeros(q.shape[0], q.shape[1], fmt.v_head_dim, dtype=torch.float32)
    lse = o.new_full(q.shape[:2], float("-inf"))
    if sinks is not None:
        lse = lse.logaddexp(sinks.float())
    for n, (packed, length) in enumerate(zip(stored.tolist(), lengths.tolist(), strict=True)):
        mine = slice(starts[n], starts[n + 1])
        rows, state = q[mine].float(), (o[mine], lse[mine])
        if not len(rows):
            continue
        for first in range(0, packed // size, step):
            blocks = block_tables[n, first : min(first + step, packed // size)]
            k, v = fetch(fmt, storage, blocks, len(blocks) * size)
            state = merge(*state, *attend_exact(rows, k, v, scale))
        if length > packed:
            assert residual_k is not None
            assert residual_v is not None
            assert states is not None
            place = torch.arange(packed, length, device=q.device) % residual_k.shape[1]
            k, v = (x[states[n].long(), place].float() for x in (residual_k, residual_v))
            state = merge(*state, *attend_exact(rows, k, v, scale))
        o[mine], lse[mine] = state
    return o, lse
