"""Fast operations, each with a plain PyTorch reference that is its specification and its
fallback."""

from __future__ import annotations

from serval.kernels import oscar
from serval.kernels.attention import paged_attention, paged_attention_int8
from serval.kernels.cache_write import write_cache, write_cache_int8
from serval.kernels.dense_linear import linear
from serval.kernels.gated import swiglu
from serval.kernels.grouped_linear import grouped_linear
from serval.kernels.latent_attention import paged_latent_attention
from serval.kernels.norm import add_rms_norm, rms_norm
from serval.kernels.received_mass import received_mass
from serval.kernels.rope import rotary
from serval.kernels.snapmla import fetch_snapmla, snapmla_attention, write_snapmla
from serval.kernels.w4a8 import (
    PackedWeight,
    empty_packed_weight,
    pack_weight,
    quantized_embedding,
    quantized_grouped_linear,
    quantized_linear,
    quantized_linear_multi,
    stack_weights,
    unpack_weight,
)
from serval.kernels.walsh_hadamard import hadamard, hadamard_pair

__all__ = [
    "PackedWeight",
    "add_rms_norm",
    "empty_packed_weight",
    "fetch_snapmla",
    "grouped_linear",
    "hadamard",
    "hadamard_pair",
    "linear",
    "oscar",
    "pack_weight",
    "paged_attention",
    "paged_attention_int8",
    "paged_latent_attention",
    "quantized_embedding",
    "quantized_grouped_linear",
    "quantized_linear",
    "quantized_linear_multi",
    "received_mass",
    "rms_norm",
    "rotary",
    "snapmla_attention",
    "stack_weights",
    "swiglu",
    "unpack_weight",
    "write_cache",
    "write_cache_int8",
    "write_snapmla",
]
