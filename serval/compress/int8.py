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
transformers does not load a quantised tied table, nor (as of 5.17) the experts of any
compressed-tensors checkpoint.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from torch import nn

from serval.compress.compressor import CompressionReport, Progress
from serval.compress.export import int8_group, quantization_config
from serval.compress.int8_modules import (
    DequantizedLinear,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    TiedInt8Head,
)
from serval.compress.targets import WHY_KEPT, Target, replace, stores_experts_apart, targets
from serval.models.decoder import Decoder


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
            module = _MODULES[target.kind].quantize(target.module, target.name)
            self.install(decoder, target, module)
            report.quantised.append(target.name)
        if progress is not None:
            progress(len(found), len(found), "")
        tables = [t.name for t in found if t.kind == "embedding" and t.name in report.quantised]
        kept = [
            name
            for t in found
            if t.kind != "embedding" and t.name in report.kept
            for name in t.checkpoint_modules()
        ]
        groups = [int8_group(["Linear"])]
        if tables:
            groups.append(int8_group(tables, activations=False))
        if decoder.config.tie_word_embeddings:
            kept.append("lm_head")  # transformers makes one: the table a second time
        decoder.quantization_config = quantization_config(groups, ignore=kept)
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

    @staticmethod
    def reads(group: dict[str, Any]) -> bool:
        weights = group.get("weights") or {}
        wanted = int8_group([])["weights"]
        return all(weights.get(key) == wanted[key] for key in _DEFINING)

    @staticmethod
    def empty(target: Target) -> nn.Module:
        return _MODULES[target.kind].like(target.module)

    @staticmethod
    def install(decoder: Decoder, target: Target, module: nn.Module) -> None:
        replace(decoder, target.path, module)
        if isinstance(module, Int8Embedding) and decoder.config.tie_word_embeddings:
            setattr(decoder, "lm_head", TiedInt8Head(module))  # noqa: B010 not an nn.Linear


_DEFINING = ("num_bits", "type", "symmetric", "strategy", "dynamic")

_MODULES: dict[str, Any] = {
    "linear": Int8Linear,
    "head": Int8Linear,
    "embedding": Int8Embedding,
    "experts": Int8Experts,
    "latent": DequantizedLinear,
}
