"""ggml's flash attention over f16 and q4_0 caches, through the libraries in llama-cpp-python's
wheel, with keys and values laid out as llama.cpp lays them: token by token, all heads together."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serval.bench.ggml import BLOCK, BLOCK_BYTES, F32, Q4_0, _InitParams, _libraries, quantize_q4_0
from serval.models.attention import AttentionSpec

F16 = 1
KINDS = {"f16": F16, "q4_0": Q4_0}
GGML_BYTES = {"f16": 2.0, "q4_0": BLOCK_BYTES / BLOCK}  # per number

Tokens = Callable[[int, int], tuple[Tensor, Tensor]]
PIECE = 4096


def _encode(rows: Tensor, kind: str) -> np.ndarray:
    """Rows [n, Hkv, D] as the bytes of the cache type [n, bytes]."""
    flat = rows.flatten(1)
    return quantize_q4_0(flat) if kind == "q4_0" else flat.half().numpy().view(np.uint8)


def ggml_reader(
    spec: AttentionSpec, q: Tensor, length: int, kind: str, tokens: Tokens, layers: int
) -> Callable[[], Tensor]:
    """Attention of q [N, H, D] over N sequences of `length` tokens, layer after layer.

    kind: "f16" or "q4_0". tokens(first, count): keys and values, count at most 4096. Raises
    MissingPeerError without llama-cpp-python.
    """
    base, cpu = _libraries()
    for name in ("ggml_new_tensor_4d", "ggml_permute", "ggml_flash_attn_ext"):
        getattr(base, name).restype = c_void_p
    base.ggml_new_tensor_4d.argtypes = [c_void_p, c_int] + [c_int64] * 4
    base.ggml_permute.argtypes = [c_void_p, c_void_p] + [c_int] * 4
    base.ggml_flash_attn_ext.argtypes = [c_void_p] * 5 + [c_float] * 3
    backend = cpu.ggml_backend_cpu_init()
    cpu.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    context = base.ggml_init(_InitParams(c_size_t((1 << 20) + layers * 65536), None, c_bool(True)))
    batch, heads, dim = q.shape
    new = base.ggml_new_tensor_4d
    rows = new(context, F32, dim, 1, heads, batch)
    stored, outs, graphs = [], [], []
    for _ in range(layers):
        pair = [
            new(context, KINDS[kind], width, spec.num_key_value_heads, length, batch)
            for width in (spec.head_dim, spec.v_head_dim)
        ]
        k, v = (base.ggml_permute(context, each, 0, 2, 1, 3) for each in pair)
        out = base.ggml_flash_attn_ext(context, rows, k, v, None, spec.head_dim**-0.5, 0.0, 0.0)
        graph = base.ggml_new_graph_custom(context, 16, False)
        base.ggml_build_forward_expand(graph, out)
        stored.append(pair)
        outs.append(out)
        graphs.append(graph)
    buffer = base.ggml_backend_alloc_ctx_tensors(context, backend)
    for n in range(batch):
        for first in range(0, length, PIECE):
            count = min(PIECE, length - first)
            data = [_encode(x, kind) for x in tokens(n * length + first, count)]
            for pair in stored:
                for tensor, part in zip(pair, data, strict=True):
                    offset = (n * length + first) * part.shape[1]
                    base.ggml_backend_tensor_set(tensor, part.ctypes.data, offset, part.nbytes)
    q = q.contiguous()
    base.ggml_backend_tensor_set(rows, q.data_ptr(), 0, q.nbytes)
    turn = -1

    def read() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % layers
        base.ggml_backend_graph_compute(backend, graphs[turn])
        out = torch.empty(batch, heads, spec.v_head_dim)
        base.ggml_backend_tensor_get(outs[turn], out.data_ptr(), 0, out.nbytes)
        return out

    weakref.finalize(read, _free, base, buffer, context, backend)
    return read


def _free(base: Any, buffer: int, context: int, backend: int) -> None:
    base.ggml_backend_buffer_free(buffer)
    base.ggml_free(context)
    base.ggml_backend_free(backend)
