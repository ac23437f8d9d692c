"""Small layers every block uses: RMSNorm and the rotary table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from serval import kernels
from serval.kernels import jit
from serval.models.config import RopeConfig


class Linear(nn.Linear):
    """nn.Linear whose few rows, as in decoding, run in a kernel that reads the weight in place."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return kernels.linear(x, self.weight, self.bias)


def shared_input(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """[module(x) for each module], in one call where they can.

    A class may offer `together(modules, x)`, a static method that returns all outputs, or None for
    modules it cannot join; it is asked when all modules are of that class and none has hooks.
    """
    kind = type(modules[0])
    together = getattr(kind, "together", None)
    if together is not None and all(
        type(m) is kind and not m._forward_pre_hooks and not m._forward_hooks for m in modules
    ):
        outputs = together(modules, x)
        if outputs is not None:
            return outputs
    return [module(x) for module in modules]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape; the statistics are float32."""
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) of two tensors [..., size], in one pass."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_positions: int
) -> tuple[Tensor, float]:
    """Rotary inverse frequencies [R/2] in float32 and the factor on cos and sin.

    Default: theta^(-2i/R). Llama 3: wavelengths above original/low_freq_factor are divided by
    `factor`, below original/high_freq_factor kept, in between blended. YaRN: blend by the number of
    rotations over the original context, with attention factor 0.1 ln(factor) + 1.
    """
    width = int(head_dim * rope.fraction)
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    inv = 1.0 / rope.theta**exponent
    if rope.kind == "default":
        return inv, 1.0
    original = rope.original_max_position_embeddings or max_positions
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inv
        long, short = original / rope.low_freq_factor, original / rope.high_freq_factor
        smooth = (original / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * inv / rope.factor + smooth * inv
        inv_scaled = torch.where(wavelength > long, inv / rope.factor, inv)
        middle = (wavelength >= short) & (wavelength <= long)
        return torch.where(middle, blended, inv_scaled), 1.0

    def dimension_of(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    inv = inv / rope.factor * ramp + inv * (1 - ramp)
    return inv, _yarn_attention_factor(rope)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor (arXiv 2309.00071): 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        top = yarn_mscale(rope.factor, rope.mscale)
        return top / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


class RotaryTable(nn.Module):
    """cos and sin [rows, R/2] in float32, made on first use on the device that asks; `rows` is
    max_positions until it is extended."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int) -> None:
        super().__init__()
        self.rope = rope
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.rows = max_positions
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def extend(self, positions: int) -> None:
        """Make room for positions beyond those the model was made for, at its frequencies: for
        caches that count positions within themselves. Call it before tables are handed out."""
        if positions > self.rows:
            self.rows = positions
            self._tables.clear()

    def forward(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each float32 [rows, R/2] on `device`."""
        if device not in self._tables:
            with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
                inv, factor = inverse_frequencies(self.rope, self.head_dim, self.max_positions)
                angle = torch.arange(self.rows, dtype=torch.float32)[:, None] * inv
                cos, sin = angle.cos() * factor, angle.sin() * factor
            self._tables[device] = (cos.to(device), sin.to(device))
        jit.keep(self._tables[device])  # extending makes new ones
        return self._tables[device]
