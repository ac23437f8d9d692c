"""Scatter new keys and values into a paged cache, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _scatter(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Write rows [T, Hkv, ...] to `cache` [B, Hkv, S, ...] at slots block * S + offset; negative
    slots are skipped."""
    kept = slots >= 0
    block, offset = slots[kept] // cache.shape[2], slots[kept] % cache.shape[2]
    rows = rows[kept]
    if cache.dtype == torch.float16:  # an infinity would turn attention into NaN
        largest = torch.finfo(torch.float16).max
        rows = rows.float().clamp(-largest, largest)
    cache[block, :, offset] = rows.to(cache.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: x [..., D] -> (int8 [..., D], float32 scale [...]), scale = max|x| /
    127."""
    wide = x.float()
    scale = wide.abs().amax(-1) * (1.0 / 127.0)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return (wide * inverse[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def write_cache(
    k: Tensor, v: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    """Store k [T, Hkv, D], v [T, Hkv, Dv] in caches [B, Hkv, S, D|Dv] at `slots` int64 [T] (block *
    S + offset), in the caches' dtype; float16 saturates."""
    _scatter(k, slots, key_cache)
    _scatter(v, slots, value_cache)


def write_cache_int8(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
) -> None:
    """As `write_cache`, quantising each token's head to int8; scales float32 [B, Hkv, S]."""
    for rows, cache, scales in ((k, key_cache, key_scales), (v, value_cache, value_scales)):
        codes, scale = quantize_rows(rows)
        _scatter(codes, slots, cache)
        _scatter(scale, slots, scales)
