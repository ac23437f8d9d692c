"""ggml's own matrix product with Q4_0 weights, through the libraries in llama-cpp-python's wheel.

The weight lies in the CPU backend's repacking buffer, where ggml interleaves eight rows of Q4_0 for
its fastest kernel, as llama.cpp does at load.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serval.bench.harness import MissingPeerError

Q4_0, F32 = 2, 0
BLOCK, BLOCK_BYTES = 32, 18
_KEEP = 1 << 20  # bytes of a context that holds descriptions only


_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _libraries() -> tuple[Any, Any]:
    """libggml-base and libggml-cpu; raises MissingPeerError."""
    spec = find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    paths = [folder / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu")]
    if not all(path.exists() for path in paths):
        raise MissingPeerError("llama-cpp-python", "pip install 'serval-llm[bench]'")
    base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)
    pointer = {
        base: "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph_custom "
        "ggml_backend_buft_name ggml_backend_alloc_ctx_tensors_from_buft "
        "ggml_backend_alloc_ctx_tensors ggml_backend_reg_get_proc_address ggml_backend_reg_dev_get",
        cpu: "ggml_backend_cpu_init ggml_backend_cpu_reg",
    }
    for library, names in pointer.items():
        for name in names.split():
            getattr(library, name).restype = c_void_p
    base.ggml_backend_buft_name.restype = c_char_p
    base.ggml_init.argtypes = [_InitParams]
    base.ggml_new_tensor_2d.argtypes = [c_void_p, c_int, c_int64, c_int64]
    base.ggml_mul_mat.argtypes = [c_void_p] * 3
    base.ggml_new_graph_custom.argtypes = [c_void_p, c_size_t, c_bool]
    base.ggml_build_forward_expand.argtypes = [c_void_p] * 2
    base.ggml_backend_buft_name.argtypes = [c_void_p]
    base.ggml_backend_alloc_ctx_tensors_from_buft.argtypes = [c_void_p] * 2
    base.ggml_backend_alloc_ctx_tensors.argtypes = [c_void_p] * 2
    base.ggml_backend_tensor_set.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    base.ggml_backend_tensor_get.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    base.ggml_backend_graph_compute.argtypes = [c_void_p] * 2
    base.ggml_backend_reg_get_proc_address.argtypes = [c_void_p, c_char_p]
    base.ggml_backend_reg_dev_get.argtypes = [c_void_p, c_size_t]
    base.ggml_free.argtypes = [c_void_p]
    base.ggml_backend_buffer_free.argtypes = [c_void_p]
    base.ggml_backend_free.argtypes = [c_void_p]
    base.ggml_log_set.argtypes = [c_void_p, c_void_p]
    cpu.ggml_backend_cpu_set_n_threads.argtypes = [c_void_p, c_int]
    base.ggml_log_set(ctypes.cast(_SILENT, c_void_p), None)
    return base, cpu


def quantize_q4_0(weight: torch.Tensor) -> np.ndarray:
    """float32 [N, K] -> Q4_0 bytes [N, K / 32 * 18]: d = (signed value of max |w|) / -8."""
    blocks = weight.numpy().reshape(weight.shape[0], -1, BLOCK)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    d = peak / -8.0
    inverse = np.divide(1.0, d, out=np.zeros_like(d), where=d != 0)
    q = np.clip((blocks * inverse + 8.5).astype(np.int32), 0, 15).astype(np.uint8)
    nibbles = q[..., :16] | q[..., 16:] << 4
    scale = d.astype(np.float16).view(np.uint8)
    return np.concatenate([scale, nibbles], axis=-1).reshape(weight.shape[0], -1)


class Product:
    """y = x W^T with W [N, K] in repacked Q4_0 and float32 x [rows, K]; K a multiple of 32.

    Several copies of the weight may be made, to be used in turn: `run(i)`.
    """

    def __init__(self, weight: np.ndarray, rows: int, threads: int, copies: int = 1) -> None:
        """weight: Q4_0 bytes of `quantize_q4_0`. Raises MissingPeerError."""
        base, cpu = _libraries()
        self._base = base
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        n, k = weight.shape[0], weight.shape[1] // BLOCK_BYTES * BLOCK
        self.shape = (rows, n)
        room = _KEEP + copies * 16384
        self._contexts = [base.ggml_init(_InitParams(room, None, True)) for _ in range(2)]
        weights = [base.ggml_new_tensor_2d(self._contexts[0], Q4_0, k, n) for _ in range(copies)]
        self._x = base.ggml_new_tensor_2d(self._contexts[1], F32, k, rows)
        self._outs = [base.ggml_mul_mat(self._contexts[1], w, self._x) for w in weights]
        self.repacked, kind = self._buffer_type(cpu)
        self._buffers = [
            base.ggml_backend_alloc_ctx_tensors_from_buft(self._contexts[0], kind)
            if kind
            else base.ggml_backend_alloc_ctx_tensors(self._contexts[0], self.backend),
            base.ggml_backend_alloc_ctx_tensors(self._contexts[1], self.backend),
        ]
        for tensor in weights:
            base.ggml_backend_tensor_set(tensor, weight.ctypes.data, 0, weight.nbytes)
        self._graphs = []
        for out in self._outs:
            graph = base.ggml_new_graph_custom(self._contexts[1], 16, False)
            base.ggml_build_forward_expand(graph, out)
            self._graphs.append(graph)

    def _buffer_type(self, cpu: Any) -> tuple[bool, Any]:
        base = self._base
        registry = cpu.ggml_backend_cpu_reg()
        name = b"ggml_backend_dev_get_extra_bufts"
        address = base.ggml_backend_reg_get_proc_address(registry, name)
        if not address:
            return False, None
        list_types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        types = list_types(base.ggml_backend_reg_dev_get(registry, 0))
        index = 0
        while types and types[index]:
            if b"REPACK" in base.ggml_backend_buft_name(types[index]).upper():
                return True, types[index]
            index += 1
        return False, None

    def set_input(self, x: torch.Tensor) -> None:
        """Copy float32 rows [rows, K]."""
        rows = x.contiguous()
        self._base.ggml_backend_tensor_set(self._x, rows.data_ptr(), 0, rows.nbytes)

    def run(self, copy: int = 0) -> None:
        """Multiply by one copy of the weight."""
        self._base.ggml_backend_graph_compute(self.backend, self._graphs[copy])

    def output(self, copy: int = 0) -> torch.Tensor:
        """The last result of `run(copy)`, float32 [rows, N]."""
        out = torch.empty(self.shape)
        self._base.ggml_backend_tensor_get(self._outs[copy], out.data_ptr(), 0, out.nbytes)
        return out

    def close(self) -> None:
        """Free everything."""
        for buffer in self._buffers:
            self._base.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            self._base.ggml_free(context)
        self._base.ggml_backend_free(self.backend)
