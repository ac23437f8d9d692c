"""What each key receives of causal attention, and each row's log-sum-exp, without the matrix.

The streaming importance of PrefixKV (arXiv 2412.03409, section 3) and the received mass of
attention-sink metrics (arXiv 2604.10098, eq. 5): A_ij = exp(z_ij - lse_i), mass_j = sum_i A_ij.

Floor: one product of D numbers and one exponential per visible (query head, key) pair. CPU: C++ in
float32; the blockwise reference serves float64 and other devices. Never more than a block of rows
of scores exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.received_mass import reference

_KERNEL = jit.Kernel("received_mass", "received_mass", "plllll plllll l f p i p p i")


def _run(
    function: jit.Function,
    q: Tensor,
    k: Tensor,
    scale: float,
    first: int,
    window: int | None,
    sinks: Tensor | None,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    q, k = q.detach().float(), k.detach().float()
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    (rows, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    mass = torch.empty((heads, keys) if per_head else (keys,), dtype=torch.float32)
    lse = torch.empty(rows, heads, dtype=torch.float32)
    function(
        q.data_ptr(), q.stride(0), q.stride(1), rows, heads, dim,
        k.data_ptr(), k.stride(0), k.stride(1), keys, kv_heads, first,
        window or 0, scale, None if sinks is None else sinks.data_ptr(), int(per_head),
        mass.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return mass, lse


def _received_mass(
    q: Tensor, k: Tensor, scale: float, first: int, window: int | None, sinks: Tensor | None,
    per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.device.type == "cpu" and q.dtype != torch.float64:
        function = _KERNEL.get()
        if function is not None:
            return _run(function, q, k, scale, first, window, sinks, per_head)
    with torch.no_grad():
        return reference.received_mass(q, k, scale, first, window, sinks, per_head)


def _shapes(
    q: Tensor, k: Tensor, scale: float, first: int, window: int | None, sinks: Tensor | None,
    per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], k.shape[0]) if per_head else (k.shape[0],)
    return q.new_empty(shape, dtype=wide), q.new_empty(q.shape[:2], dtype=wide)


jit.define(
    "received_mass(Tensor q, Tensor k, float scale, int first, int? window, Tensor? sinks,"
    " bool per_head) -> (Tensor, Tensor)",
    _received_mass,
    _shapes,
)


def received_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    first: int,
    window: int | None = None,
    sinks: Tensor | None = None,
    per_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """What each key receives from these queries of one sequence; no gradients.

    Args:
        q: [n, H, D], at positions first..first + n - 1, rotary applied.
        k: [m, Hkv, D], keys at positions 0..m - 1, m at least first + n; keys that no query sees
            receive 0.
        scale: factor on the scores.
        first: the position of q[0] among the keys.
        window: a query at position p sees keys from p - window + 1; None for all.
        sinks: [H] logits that only enlarge the softmax denominator (and so the lse).
        per_head: keep the heads apart.

    Returns: mass [m], summed over queries and averaged over query heads (per_head: [H, m], summed
    over queries), and lse [n, H], natural logarithms; float32, or float64 for float64 q. Raises
    ValueError for shapes that do not fit.
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"received_mass got q {tuple(q.shape)} and k {tuple(k.shape)}; it expects [n, H, D] "
            "and [m, Hkv, D] with H divisible by Hkv"
        )
    if first < 0 or first + q.shape[0] > k.shape[0]:
        raise ValueError(
            f"received_mass got {q.shape[0]} queries from position {first} and {k.shape[0]} keys; "
            "every query's own key must be among the keys"
        )
    if window is not None and window < 1:
        raise ValueError(f"received_mass got window {window}; it expects None or at least 1")
    call = _received_mass if jit.plain(q, k) else torch.ops.serval.received_mass
    return call(q, k, scale, first, window, sinks, per_head)
