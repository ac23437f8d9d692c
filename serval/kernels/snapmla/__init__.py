"""SnapMLA (arXiv:2602.10718): latent attention over an FP8 cache, storing into it, reading it back.

Floor of a decode step: a visible token's `C + 4 + 2R` bytes are read once for all heads and cost
`2 H (2C + R)` operations. A cache in bfloat16 has `2 (C + R)` bytes, in float32 `4 (C + R)`. With
the head counts of real models (16 to 128) CPUs are bound by arithmetic: products of E4M3 numbers
are exact in bfloat16, so AVX512-BF16 carries them at twice float32's rate. GPU: Triton, products of
FP8 codes on tensor cores.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import jit
from serval.kernels.attention import check_status, int32
from serval.kernels.snapmla import reference

_ATTENTION = jit.Kernel("snapmla", "snapmla_attention", "plll l plll ppp ll pl pp ll f i pp i")
_WRITE = jit.Kernel("snapmla", "snapmla_write", "pll pll pl ppp l i i")
_FETCH = jit.Kernel("snapmla", "snapmla_fetch", "ppp llll pll p i")


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The Triton implementations, or None without Triton; imported late, as Triton is slow to
    load."""
    try:
        from serval.kernels.snapmla import gpu
    except ImportError:
        return None
    return gpu


def _rows(x: Tensor) -> Tensor:
    x = x.detach().float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _compiled(kernel: jit.Kernel, caches: tuple[Tensor, ...]) -> jit.Function | None:
    """The C++ function, where it can read (and write) these caches in place."""
    usable = all(cache.device.type == "cpu" and cache.is_contiguous() for cache in caches)
    return kernel.get() if usable else None


def _attention(
    q_latent: Tensor, q_rope: Tensor, codes: Tensor, scales: Tensor, rope: Tensor,
    block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, scale: float, rope8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gpu = _triton_kernels() if q_latent.is_cuda else None
    caches = (codes, scales, rope)
    if gpu is not None:
        return gpu.paged_attention(
            q_latent, q_rope, *caches, block_tables, context_lens, query_starts, scale, rope8
        )
    function = _compiled(_ATTENTION, caches)
    if function is None:
        return reference.paged_attention(
            q_latent, q_rope, *caches, block_tables, context_lens, query_starts, scale, rope8
        )
    q, q2 = _rows(q_latent), _rows(q_rope)
    block_tables, context_lens = int32(block_tables), int32(context_lens)
    query_starts = int32(query_starts)
    rows, heads, latent = q.shape
    blocks, page, _ = codes.shape
    make = torch.zeros if query_starts.numel() < 2 else torch.empty
    out = make(rows, heads, latent, dtype=torch.float32)
    lse = make(rows, heads, dtype=torch.float32)
    status = function(
        q.data_ptr(), q.stride(0), q.stride(1), heads, latent,
        q2.data_ptr(), q2.stride(0), q2.stride(1), q2.shape[2],
        codes.data_ptr(), scales.data_ptr(), rope.data_ptr(), page, blocks,
        block_tables.data_ptr(), block_tables.shape[1],
        context_lens.data_ptr(), query_starts.data_ptr(), context_lens.shape[0],
        rows, scale, int(rope8), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check_status(status, block_tables, context_lens, blocks)
    return out, lse


def _write(
    latent: Tensor, k_rope: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, rope: Tensor,
    rope8: bool,
) -> None:  # fmt: skip
    gpu = _triton_kernels() if latent.is_cuda else None
    if gpu is not None:
        gpu.write(latent, k_rope, slots, codes, scales, rope, rope8)
        return
    function = _compiled(_WRITE, (codes, scales, rope))
    if function is None:
        reference.write(latent, k_rope, slots, codes, scales, rope, rope8)
        return
    x, x2, slots = _rows(latent), _rows(k_rope), slots.to(torch.int64).contiguous()
    status = function(
        x.data_ptr(), x.stride(0), x.shape[1], x2.data_ptr(), x2.stride(0), x2.shape[1],
        slots.data_ptr(), x.shape[0], codes.data_ptr(), scales.data_ptr(), rope.data_ptr(),
        scales.numel(), int(rope8), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise CacheError(
            f"write_snapmla got slot {int(slots.max())}; a cache of {codes.shape[0]} blocks of "
            f"{codes.shape[1]} tokens has slots 0 to {scales.numel() - 1}"
        )


jit.define(
    "snapmla_attention(Tensor q_latent, Tensor q_rope, Tensor codes, Tensor scales, Tensor rope,"
    " Tensor block_tables, Tensor context_lens, Tensor query_starts, float scale, bool rope8)"
    " -> (Tensor, Tensor)",
    _attention,
    lambda q_latent, *rest: (
        q_latent.new_empty(q_latent.shape, dtype=torch.float32),
        q_latent.new_empty(q_latent.shape[:2], dtype=torch.float32),
    ),
)
jit.define(
    "write_snapmla(Tensor latent, Tensor k_rope, Tensor slots, Tensor(a!) codes, Tensor(b!) scales,"
    " Tensor(c!) rope, bool rope8) -> ()",
    _write,
    lambda *tensors: None,
)


def _check(widths: tuple[int, int], codes: Tensor, scales: Tensor, rope: Tensor) -> None:
    kinds = (codes.dtype, scales.dtype, rope.dtype)
    if kinds != (torch.uint8, torch.float32, torch.bfloat16):
        raise ValueError(
            f"a SnapMLA cache of {kinds} was given; expected uint8 codes, float32 scales and "
            "bfloat16 rotary keys"
        )
    if (
        codes.shape[:2] != scales.shape
        or rope.shape[:2] != scales.shape
        or widths != (codes.shape[2], rope.shape[2])
    ):
        raise ValueError(
            f"rows of {widths[0]} + {widths[1]} numbers do not fit codes {tuple(codes.shape)}, "
            f"scales {tuple(scales.shape)} and rotary keys {tuple(rope.shape)}; expected caches "
            "[B, S, C], [B, S] and [B, S, R]"
        )


def snapmla_attention(
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
    """Causal attention of packed queries over a paged FP8 latent cache; no gradients.

    Queries are quantised per token and head, probabilities per row and 64 keys, as `reference.py`
    says; any page size serves.

    Args:
        q_latent, q_rope: [T, H, C] (the key up-projection folded in) and [T, H, R].
        codes, scales, rope: uint8 [B, S, C], float32 [B, S], bfloat16 [B, S, R].
        block_tables, context_lens, query_starts: as in `paged_attention`.
        scale: factor on the scores.
        rope8: the rotary part of queries is rounded to E4M3 with the latent's scale too.

    Returns: o [T, H, C] and lse [T, H] (natural logarithm), float32. Raises CacheError when lengths
    or block ids do not fit.
    """
    _check((q_latent.shape[2], q_rope.shape[2]), codes, scales, rope)
    call = _attention if jit.plain(q_latent, codes) else torch.ops.serval.snapmla_attention
    return call(
        q_latent, q_rope, codes, scales, rope, block_tables, context_lens, query_starts, scale,
        rope8,
    )  # fmt: skip


def write_snapmla(
    latent: Tensor,
    k_rope: Tensor,
    slots: Tensor,
    codes: Tensor,
    scales: Tensor,
    rope: Tensor,
    rope8: bool = False,
) -> None:
    """Quantise latent [T, C], align k_rope [T, R], and store both at `slots` int64 [T] (block * S +
    offset; negative: skipped) of the caches of `snapmla_attention`.

    A token's codes depend on that token only. Raises CacheError for a slot that does not exist.
    """
    _check((latent.shape[1], k_rope.shape[1]), codes, scales, rope)
    call = _write if jit.plain(latent, codes) else torch.ops.serval.write_snapmla
    call(latent, k_rope, slots, codes, scales, rope, rope8)


def fetch_snapmla(
    codes: Tensor, scales: Tensor, rope: Tensor, block_table: Tensor, length: int
) -> Tensor:
    """What one sequence's first `length` tokens stand for, [latent | rotary key] in float32
    [length, C + R]. block_table: int32 [M]. Raises CacheError when the table does not fit."""
    function = _compiled(_FETCH, (codes, scales, rope))
    if function is None:
        return reference.fetch(codes, scales, rope, block_table, length)
    table = int32(block_table)
    out = torch.empty(length, codes.shape[2] + rope.shape[2])
    status = function(
        codes.data_ptr(), scales.data_ptr(), rope.data_ptr(), codes.shape[2], rope.shape[2],
        codes.shape[1], codes.shape[0], table.data_ptr(), table.shape[0], length,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check_status(status, table[None], torch.tensor([length]), codes.shape[0])
    return out
