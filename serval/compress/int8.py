"""W8A8: int8 weights per output channel and int8 activations per token.

The vector-wise scheme of LLM.int8() (arXiv 2208.07339, section 3.1) without its outlier
decomposition, rounded as compressed-tensors does:

    s_n = max_k |W[n, k]| / 127.5        Q[n, k] = clamp(round(W[n, k] / s_n), -128, 127)
    y[t, n] = sx_t s_n sum_k X[t, k] Q[n, k],   sx_t = max_k |x[t, k]| / 127

s_n is rounded to the dtype it is stored in before Q is computed, so that stored codes and scales
belong together. Weights are packed for the kernel once, at load. What stays in float: norms,
routers, MLA's kv_b_proj (the cache multiplies by it), biases, and by default embedding and head.

`head=True` also quantises the output head, which decoding one sequence reads whole for each token.
If it is tied, the shared table becomes int8 for both uses. Such a checkpoint loads in Serval;
transformers does not load a quantised tied table, nor (as of 5.17) the experts of an int-quantized
checkpoint.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from serval.compress.compressed_tensors import quantization_config_of
from serval.compress.compressor import CompressionReport, Progress
from serval.compress.install import install
from serval.compress.scheme import WeightScheme, quantize, require_finite
from serval.compress.targets import WHY_KEPT, Target, stores_experts_apart, targets
from serval.models.decoder import Decoder
from serval.models.moe import Experts

SCHEME = WeightScheme(bits=8)


@dataclass
class Int8:
    """Parameters: head: quantise the output head too (with a tied table: the embedding as well).
    ignore: checkpoint names of modules to keep in float, shell patterns allowed."""

    head: bool = False
    ignore: tuple[str, ...] = ()

    def compress(self, decoder: Decoder, progress: Progress | None = None) -> CompressionReport:
        found = list(targets(decoder))
        experts_apart = stores_experts_apart(decoder)
        report = CompressionReport()
        for done, target in enumerate(found):
            if progress is not None:
                progress(done, len(found), target.name)
            why = self._reason_to_keep(target, decoder, experts_apart)
            if why is not None:
                report.kept[target.name] = why
                continue
            install(decoder, target, [quantize(w, SCHEME, w.dtype) for w in _matrices(target)])
            report.quantised.append(target.name)
        if progress is not None:
            progress(len(found), len(found), "")
        decoder.quantization_config = quantization_config_of(decoder)
        return report

    def _reason_to_keep(self, target: Target, decoder: Decoder, experts_apart: bool) -> str | None:
        if any(fnmatch.fnmatchcase(target.name, pattern) for pattern in self.ignore):
            return "asked for"
        tied_head = target.kind == "embedding" and decoder.config.tie_word_embeddings
        if self.head and (target.kind == "head" or tied_head):
            return None
        if target.kind == "experts" and experts_apart:
            return None
        if tied_head:
            return "embedding table, tied to the output head (choose it with head=True)"
        return WHY_KEPT.get(target.kind)


def _matrices(target: Target) -> Iterator[Tensor]:
    """The float matrices of a target, one for each of its checkpoint modules."""
    module = target.module
    if not isinstance(module, Experts):
        weights = [module.weight]
    else:
        weights = [
            weight
            for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True)
            for weight in (*gate_up.chunk(2), down)
        ]
    for name, weight in zip(target.checkpoint_modules(), weights, strict=True):
        assert isinstance(weight, Tensor)
        require_finite(weight, f"{name}.weight")
        yield weight
