"""SnapMLA's configurations, their errors on synthetic latents, and models whose memory uses them.

The configurations of the paper's ablation (arXiv:2602.10718, table 2), as what is stored of a
sequence of latents c [L, C] and rotary keys k [L, R]:

    snapmla  scale per token, max|c| / 448; rotary keys in bfloat16
    a        scale per token over c and k together; rotary keys in E4M3 too, queries alike
    b        scale 1; rotary keys in bfloat16
    c        one scale for the whole tensor, max|c| / 448 over all tokens; rotary keys in bfloat16
    d        one scale per block of 64 tokens; rotary keys in bfloat16

All attend by the same arithmetic (`serval.kernels.snapmla.reference`) with queries quantised per
token and head, since the ablation is of the cache. `c` and `d` see the whole text here, also what
is later than a query; the cache layout codes a token by those up to it.

Three regimes of tokens: `gaussian`, c and k standard normal; `rope`, k ten times larger, four dims
two hundred times, which queries answer with as much smaller numbers; `norms`, every latent times a
factor of its own, log-normal with sigma 2. The softmax scale is set so that the exact logits have a
standard deviation of 2: without, one key takes all and every configuration looks perfect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from serval.kernels.snapmla import reference
from serval.kernels.snapmla.reference import BLOCK, Keys
from serval.models.attention import AttentionSpec, LatentAttention
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.models.memory import CausalMemory

CONFIGS = ("snapmla", "a", "b", "c", "d")
REGIMES = ("gaussian", "rope", "norms")
DEEPSEEK = AttentionSpec("mla", 16, 1, 192, 128, kv_lora_rank=512, qk_rope_head_dim=64)
LOGIT_STD = 2.0


def keys_of(config: str, latent: Tensor, k_rope: Tensor) -> Keys:
    """What `config` stores of latents [L, C] and rotary keys [L, R]."""
    if config in ("snapmla", "a"):
        return Keys(*reference.quantize(latent, k_rope, rope8=config == "a"))
    latent, k_rope = latent.float(), k_rope.float()
    largest = latent.abs().amax(-1)
    if config == "b":
        scales = torch.ones_like(largest)
    elif config == "c":
        scales = reference.scale_of(largest.max()).expand_as(largest)
    else:
        blocks = [part.max().expand_as(part) for part in largest.split(BLOCK)]
        scales = reference.scale_of(torch.cat(blocks))
    return Keys(*reference.quantize_by(latent, k_rope, scales.contiguous()))


def bytes_per_token(config: str, latent: int, rope: int) -> float:
    """Bytes of a token in the configuration's own format, scales included."""
    return {
        "snapmla": latent + 4 + 2 * rope,
        "a": latent + rope + 4,
        "b": latent + 2 * rope,
        "c": latent + 2 * rope,
        "d": latent + 4 / BLOCK + 2 * rope,
    }[config]


@dataclass(frozen=True)
class Draw:
    """Random attention: q [1, H, C], q_rope [1, H, R], latent [L, C], k_rope [L, R]."""

    q: Tensor
    q_rope: Tensor
    latent: Tensor
    k_rope: Tensor
    scale: float

    @classmethod
    def make(cls, regime: str, length: int, spec: AttentionSpec, seed: int) -> Draw:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        rank, rope, heads = spec.kv_lora_rank, spec.qk_rope_head_dim, spec.num_heads
        latent, k_rope = normal(length, rank), normal(length, rope)
        q, q_rope = 0.3 * normal(1, heads, rank), 0.3 * normal(1, heads, rope)
        if regime == "rope":
            large = torch.randperm(rope, generator=random)[:4]
            k_rope *= 10
            k_rope[:, large] *= 20
            q_rope[..., large] *= 0.02
        if regime == "norms":
            latent *= (2 * normal(length, 1)).exp()
        logits = torch.einsum("qhc,kc->hk", q, latent) + torch.einsum("qhr,kr->hk", q_rope, k_rope)
        return cls(q, q_rope, latent, k_rope, LOGIT_STD / float(logits.std()))

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """In float64: o [H, C], lse [H], logits [H, L]."""
        keys = torch.cat([self.latent, self.k_rope], 1).double()
        q = torch.cat([self.q, self.q_rope], 2)[0].double()
        z = (q @ keys.T) * self.scale
        return z.softmax(-1) @ self.latent.double(), z.logsumexp(-1), z

    def coded(self, config: str) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what `config` stores, by SnapMLA's arithmetic."""
        keys = keys_of(config, self.latent, self.k_rope)
        rope8 = config == "a"
        o, lse = reference.attend(self.q, self.q_rope, keys, self.scale, rope8=rope8)
        codes, scales, aligned = reference.quantize(self.q, self.q_rope, rope8)
        z = reference.values_of(codes)[0] @ reference.values_of(keys.codes).T
        z = (z + aligned[0].float() @ keys.rope.float().T) * scales[0][:, None] * keys.scales
        return o[0], lse[0], z * self.scale


def errors(config: str, regime: str, length: int, spec: AttentionSpec, draws: int) -> dict:
    """Means over `draws` draws: rmse, relative_l2, cosine_difference of the outputs, lse_error
    (mean absolute), top1 (share of heads with the same most likely key), logit_std."""
    found: list[dict[str, float]] = []
    for seed in range(draws):
        draw = Draw.make(regime, length, spec, seed)
        (y, lse, z), (x, coded_lse, coded_z) = draw.exact(), draw.coded(config)
        x = x.double()
        difference = (x - y).norm()
        cosine = (x * y).sum() / (x.norm() * y.norm())
        found.append(
            {
                "relative_l2": float(difference / y.norm()),
                "cosine_difference": float(1 - cosine),
                "rmse": float(difference / y.numel() ** 0.5),
                "lse_error": float((coded_lse - lse).abs().mean()),
                "top1": float((z.argmax(-1) == coded_z.argmax(-1)).float().mean()),
                "logit_std": float(z.std()),
            }
        )
    means = {key: sum(one[key] for one in found) / draws for key in found[0]}
    width = bytes_per_token(config, spec.kv_lora_rank, spec.qk_rope_head_dim)
    return {"config": config, "regime": regime, "context": length, **means, "bytes": width}


class CodedMemory(CausalMemory):
    """As `CausalMemory`, but latents pass through a configuration, and attention is SnapMLA's."""

    def __init__(self, starts: list[int], config: str) -> None:
        super().__init__(starts)
        self.config = config

    def attend_latent(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        """See `serval.models.memory.Memory.attend_latent`."""
        nope = q_nope.shape[-1]
        absorbed = torch.einsum("nhd,hdc->nhc", q_nope, kv_b[:, :nope])
        parts = []
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            keys = keys_of(self.config, latent[a:b], k_rope[a:b])
            rope8 = self.config == "a"
            o, _ = reference.attend(absorbed[a:b], q_rope[a:b], keys, scale, rope8=rope8)
            parts.append(o)
        return torch.einsum("nhc,hvc->nhv", torch.cat(parts).to(kv_b.dtype), kv_b[:, nope:])


class CodedDecoder:
    """A decoder whose latents pass through a configuration. Otherwise it is the decoder given."""

    def __init__(self, decoder: Decoder, config: str) -> None:
        self._decoder, self._config = decoder, config

    @classmethod
    def of(cls, decoder: Decoder, config: str) -> Decoder:
        """The same, for those who take a decoder."""
        return cast(Decoder, cls(decoder, config))

    def __call__(self, tokens: Tensor, batch: PackedBatch) -> Tensor:
        assert isinstance(batch.memory, CausalMemory)
        return self._decoder(
            tokens, replace(batch, memory=CodedMemory(batch.memory.starts, self._config))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@torch.no_grad()
def rescale_rotary_(decoder: Decoder, factor: float) -> None:
    """Multiply rotary keys by `factor` and divide rotary queries by it, in every latent attention
    layer: the same function, another range of numbers."""
    for module in decoder.modules():
        if isinstance(module, LatentAttention):
            mla = module.mla
            down = module.kv_a_proj_with_mqa
            down.weight[mla.kv_lora_rank :] *= factor
            if down.bias is not None:
                down.bias[mla.kv_lora_rank :] *= factor
            up = module.q_proj if mla.q_lora_rank is None else module.q_b_proj
            up.weight.view(module.num_heads, module.q_width, -1)[:, mla.qk_nope_head_dim :] /= (
                factor
            )
