"""Store new keys and values in a paged cache, float32, 16-bit, or int8 (quantised per token and
head), in one call.

Floor: each new element is read and written once. Both ops write into their cache arguments and
return nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import jit
from serval.kernels.cache_write import reference

_SIGNATURE = "plll plll p plll plll p p llll i"
_FLOATS = {
    torch.float32: jit.Kernel("cache_write", "write_cache_f32", _SIGNATURE),
    torch.bfloat16: jit.Kernel("cache_write", "write_cache_bf16", _SIGNATURE),
    torch.float16: jit.Kernel("cache_write", "write_cache_fp16", _SIGNATURE),
}
_INT8 = jit.Kernel("cache_write", "write_cache_int8", _SIGNATURE)


def _rows(x: Tensor) -> Tensor:
    x = x.detach().float()
    return x if x.stride(2) == 1 else x.contiguous()


def _run(
    function: jit.Function,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    k, v, slots = _rows(k), _rows(v), slots.to(torch.int64).contiguous()
    blocks, heads, page, _ = key_cache.shape
    k_stride, v_stride = key_cache.stride(), value_cache.stride()
    status = function(
        k.data_ptr(), k.stride(0), k.stride(1), k.shape[2],
        key_cache.data_ptr(), k_stride[0], k_stride[1], k_stride[2],
        None if key_scales is None else key_scales.data_ptr(),
        v.data_ptr(), v.stride(0), v.stride(1), v.shape[2],
        value_cache.data_ptr(), v_stride[0], v_stride[1], v_stride[2],
        None if value_scales is None else value_scales.data_ptr(),
        slots.data_ptr(), k.shape[0], heads, page, blocks, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise CacheError(
            f"write_cache got slot {int(slots.max())}; a cache of {blocks} blocks of {page} "
            f"tokens has slots 0 to {blocks * page - 1}"
        )


def _usable(
    caches: tuple[Tensor, ...], dtype: torch.dtype, scales: tuple[Tensor, ...] = ()
) -> bool:
    """Whether the C++ kernel can write these caches in place."""
    fits = all(c.device.type == "cpu" and c.dtype == dtype and c.stride(3) == 1 for c in caches)
    return fits and all(s.dtype == torch.float32 and s.is_contiguous() for s in scales)


def _write_cache(
    k: Tensor, v: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    kernel = _FLOATS.get(key_cache.dtype)
    usable = kernel is not None and _usable((key_cache, value_cache), key_cache.dtype)
    function = kernel.get() if usable and kernel is not None else None
    if function is None:
        reference.write_cache(k, v, slots, key_cache, value_cache)
    else:
        _run(function, k, v, slots, key_cache, value_cache, None, None)


def _write_cache_int8(
    k: Tensor, v: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor,
    key_scales: Tensor, value_scales: Tensor,
) -> None:  # fmt: skip
    usable = _usable((key_cache, value_cache), torch.int8, (key_scales, value_scales))
    function = _INT8.get() if usable else None
    if function is None:
        reference.write_cache_int8(k, v, slots, key_cache, value_cache, key_scales, value_scales)
    else:
        _run(function, k, v, slots, key_cache, value_cache, key_scales, value_scales)


jit.define(
    "write_cache(Tensor k, Tensor v, Tensor slots, Tensor(a!) key_cache, Tensor(b!) value_cache)"
    " -> ()",
    _write_cache,
    lambda *tensors: None,
)
jit.define(
    "write_cache_int8(Tensor k, Tensor v, Tensor slots, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor(c!) key_scales, Tensor(d!) value_scales) -> ()",
    _write_cache_int8,
    lambda *tensors: None,
)


def _check(k: Tensor, v: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    for name, rows, cache in (("keys", k, key_cache), ("values", v, value_cache)):
        if rows.shape[0] != slots.shape[0] or rows.shape[1:] != cache.shape[1::2]:
            raise ValueError(
                f"write_cache got {name} {tuple(rows.shape)} for {slots.shape[0]} slots and a "
                f"cache {tuple(cache.shape)}; it expects rows [T, Hkv, D] for a cache "
                "[B, Hkv, S, D]"
            )


def write_cache(
    k: Tensor, v: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    """Store k [T, Hkv, D] and v [T, Hkv, Dv] in caches [B, Hkv, S, D] and [B, Hkv, S, Dv].

    `slots` int64 [T] is block * S + offset; a negative slot skips its token. Caches of 16 bits get
    the nearest number; float16 saturates at its largest. Raises CacheError for a slot that does not
    exist, before anything is written.
    """
    _check(k, v, slots, key_cache, value_cache)
    call = _write_cache if jit.plain(k, key_cache) else torch.ops.serval.write_cache
    call(k, v, slots, key_cache, value_cache)


def write_cache_int8(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
) -> None:
    """As `write_cache` into int8 caches: scale = max|x| / 127 per token and head, into float32 [B,
    Hkv, S]."""
    _check(k, v, slots, key_cache, value_cache)
    call = _write_cache_int8 if jit.plain(k, key_cache) else torch.ops.serval.write_cache_int8
    call(k, v, slots, key_cache, value_cache, key_scales, value_scales)
