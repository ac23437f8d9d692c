"""Multi-head latent attention over a paged latent cache, absorbed form, for decode and short
prefill.

Floor: each visible latent row is read once, `C + R` numbers of the cache's dtype, and costs
`2 H (2 C + R)` operations; with the head counts of real models (16 to 128) it is bound by
arithmetic, so keys are used as they lie in the cache by register tiles over the heads, and the
latent part of the same row, still in cache, is the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.attention import check_status, int32, triton_kernels
from serval.kernels.latent_attention import reference

_SIGNATURE = "plll l plll plll l pl pp ll f p i"
_FLOATS = {
    torch.float32: jit.Kernel("latent_attention", "paged_latent_attention_f32", _SIGNATURE),
    torch.bfloat16: jit.Kernel("latent_attention", "paged_latent_attention_bf16", _SIGNATURE),
    torch.float16: jit.Kernel("latent_attention", "paged_latent_attention_fp16", _SIGNATURE),
}


def _paged_latent_attention(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    query_starts: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    gpu = triton_kernels() if q_latent.is_cuda else None
    if gpu is not None:
        return gpu.paged_latent_attention(
            q_latent, q_rope, cache, block_tables, context_lens, query_starts, scale
        )
    kernel = _FLOATS.get(cache.dtype) if q_latent.device.type == "cpu" else None
    function = None if kernel is None else kernel.get()
    if function is None:
        return reference.paged_latent_attention(
            q_latent, q_rope, cache, block_tables, context_lens, query_starts, scale
        )
    q, q2 = q_latent.float(), q_rope.float()
    q = q if q.stride(2) == 1 else q.contiguous()
    q2 = q2 if q2.stride(2) == 1 else q2.contiguous()
    cache = cache if cache.stride(2) == 1 else cache.contiguous()
    block_tables, context_lens = int32(block_tables), int32(context_lens)
    query_starts = int32(query_starts)
    rows, heads, latent = q.shape
    make = torch.zeros if query_starts.numel() < 2 else torch.empty
    out = make(rows, heads, latent, dtype=torch.float32)
    status = function(
        q.data_ptr(), q.stride(0), q.stride(1), heads, latent,
        q2.data_ptr(), q2.stride(0), q2.stride(1), q2.shape[2],
        cache.data_ptr(), cache.stride(0), cache.stride(1), cache.shape[1], cache.shape[0],
        block_tables.data_ptr(), block_tables.shape[1],
        context_lens.data_ptr(), query_starts.data_ptr(), context_lens.shape[0],
        rows, scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check_status(status, block_tables, context_lens, cache.shape[0])
    return out if q_latent.dtype == torch.float32 else out.to(q_latent.dtype)


jit.define(
    "paged_latent_attention(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor block_tables,"
    " Tensor context_lens, Tensor query_starts, float scale) -> Tensor",
    _paged_latent_attention,
    lambda q_latent, *rest: q_latent.new_empty(q_latent.shape),
)


def paged_latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention over a latent cache; no gradients.

    q_latent [T, H, C] (queries with the key up-projection folded in), q_rope [T, H, R], cache [B,
    S, C + R] of `[latent | rotary key]` rows; tables, lengths and starts as in `paged_attention`.
    Returns [T, H, C].
    """
    if q_latent.shape[2] + q_rope.shape[2] != cache.shape[2]:
        raise ValueError(
            f"paged_latent_attention got queries of {q_latent.shape[2]} + {q_rope.shape[2]} "
            f"dims and cache rows of {cache.shape[2]}"
        )
    plain = jit.plain(q_latent, cache)
    call = _paged_latent_attention if plain else torch.ops.serval.paged_latent_attention
    return call(q_latent, q_rope, cache, block_tables, context_lens, query_starts, scale)
