"""QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456), the part that is folded
into the weights.

RMSNorm without a gain commutes with an orthogonal map of its input, so a decoder may work in
another basis of the residual stream, in which no channel stands out (SpinQuant, arXiv 2405.16406,
calls the maps R1 and R2):

    gains    every norm's gain is multiplied into the columns of what reads it, and becomes 1
    R1       embedding E R1; readers W R1 (q, k, v, gate, up, router, experts, output head);
             writers R1^T W (o_proj, down_proj, and their biases)
    R2       per layer, on each value head: rows of v_proj R2^T W, columns of o_proj W R2; with
             latent attention the value rows of kv_b_proj

R1 and R2 are random Hadamard matrices (`serval.compress.hadamard`). The model computes the same, is
saved as an ordinary checkpoint and costs nothing at run time. Products are taken in float64 and
rounded once.

Left out: the online rotations (R3 of queries and keys, R4 of down_proj's input), which no ordinary
checkpoint can hold; inputs of down_proj keep their outliers. A tied head becomes a second table,
since the final norm's gain goes into one use of it only. Refused: a multi-token-prediction head
(two norms share one output head), and identity experts after a norm whose gain is not constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from serval.compress.block import Block
from serval.compress.expert_views import SeparateExperts
from serval.compress.hadamard import Orthogonal
from serval.compress.sites import InputSite, input_sites
from serval.errors import ConfigError
from serval.models.attention import GroupedQueryAttention, LatentAttention
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.models.layers import Linear
from serval.models.moe import Experts

_ELEMENTS_AT_ONCE = 1 << 22  # float64 working copies stay near 32 MB


@dataclass
class HadamardRotation:
    """Parameters: seed: of the random signs. values: rotate value heads too (R2)."""

    seed: int = 0
    values: bool = True
    _stream: Orthogonal | None = field(default=None, init=False, repr=False)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The rotated model's config: its head is not tied. Raises ConfigError for a model with a
        multi-token-prediction head."""
        if config.num_mtp_layers:
            raise ConfigError(
                "a model with a multi-token-prediction head cannot be rotated: the gains of two "
                "norms would have to be folded into one output head; save it with "
                "num_mtp_layers=0 first, or compress it without rotation"
            )
        self._stream = Orthogonal.random(config.hidden_size, self.seed)
        return dataclasses.replace(config, tie_word_embeddings=False)

    @property
    def stream(self) -> Orthogonal:
        """R1."""
        if self._stream is None:
            raise ConfigError("HadamardRotation.config must see the model's config first")
        return self._stream

    @torch.no_grad()
    def embedding(self, table: nn.Embedding) -> None:
        """E R1, in place."""
        _rotate_columns(table.weight, self.stream)

    def block(self, block: Block) -> None:
        """Rotate a decoder block in place; raises ConfigError naming what cannot be rotated."""
        self._rotate(block.module, [site.place for site in block.sites], block.index)

    @torch.no_grad()
    def head(self, norm: nn.Module, head: nn.Linear) -> None:
        """Fold the final norm's gain into the (untied) output head and rotate it, in place."""
        gain = norm.weight
        assert isinstance(gain, Tensor)
        head.weight.copy_(head.weight.double() * gain.double())
        gain.fill_(1)
        _rotate_columns(head.weight, self.stream)

    def rotate(self, decoder: Decoder) -> None:
        """The whole of `decoder` in place. A tied head becomes a copy of the table."""
        config = self.config(decoder.config)
        if decoder.lm_head is None:
            table = decoder.embed_tokens.weight
            head = Linear(table.shape[1], table.shape[0], bias=False, device="meta")
            head.weight = nn.Parameter(table.detach().clone())
            decoder.lm_head = head
        decoder.config = config
        for index, module in enumerate(decoder.layers):
            self._rotate(module, list(input_sites(module)), index)
        self.head(decoder.norm, decoder.lm_head)
        self.embedding(decoder.embed_tokens)

    @torch.no_grad()
    def _rotate(self, module: nn.Module, sites: Sequence[InputSite], index: int) -> None:
        for site in sites:
            if _reads_stream(site):
                _fold_gain(site)
                for reader in site.readers:
                    _rotate_columns(reader.weight, self.stream)
            elif site.name.endswith(("o_proj", "down_proj")):
                for reader in site.readers:
                    _rotate_rows(reader.weight, self.stream)
                    bias = _bias(module, reader.name)
                    if bias is not None:
                        _rotate_columns(bias, self.stream)
        if self.values:
            for attention in module.modules():
                if isinstance(attention, (GroupedQueryAttention, LatentAttention)):
                    _rotate_values(attention, self.seed + 1 + index)


def _reads_stream(site: InputSite) -> bool:
    """Whether a site's norm normalises the residual stream (q_a_layernorm does not)."""
    return site.name.startswith(("input_layernorm", "post_attention_layernorm"))


def _fold_gain(site: InputSite) -> None:
    assert site.norm is not None
    gain = site.norm.weight.detach().double()
    if site.foldable:
        for reader in site.readers:
            reader.weight.copy_(reader.weight.double() * gain)
        site.norm.weight.fill_(1)
    elif not bool((gain == gain[0]).all()):
        raise ConfigError(
            f"{site.name}: its gain differs between channels and cannot be folded, because "
            f"{site.stuck}; compress this model without rotation"
        )


def _rotate_columns(weight: Tensor, q: Orthogonal) -> None:
    """weight [..., n] -> weight Q, in place."""
    rows = weight.view(-1, q.size)
    for part in rows.split(max(1, _ELEMENTS_AT_ONCE // q.size)):
        part.copy_(q.right(part))


def _rotate_rows(weight: Tensor, q: Orthogonal) -> None:
    """weight [..., n, K] -> Q^T weight, in place."""
    for matrix in weight.view(-1, *weight.shape[-2:]):
        for part in matrix.split(max(1, _ELEMENTS_AT_ONCE // q.size), dim=1):
            part.copy_(q.right(part.T).T)


def _rotate_values(attention: GroupedQueryAttention | LatentAttention, seed: int) -> None:
    """R2: the same map for the value heads of one layer, undone by o_proj."""
    if isinstance(attention, GroupedQueryAttention):
        width = attention.head_dim
        values = attention.v_proj.weight.view(attention.num_key_value_heads, width, -1)
        bias = attention.v_proj.bias
    else:
        width = attention.mla.v_head_dim
        whole = attention.kv_b_proj.weight.view(attention.num_heads, -1, attention.mla.kv_lora_rank)
        values, bias = whole[:, attention.mla.qk_nope_head_dim :], None
    q = Orthogonal.random(width, seed)
    for head in values:
        _rotate_rows(head, q)
    if bias is not None:
        _rotate_columns(bias, q)
    _rotate_columns(attention.o_proj.weight, q)


def _bias(module: nn.Module, name: str) -> Tensor | None:
    """The bias [D] or [E, D] of the writer `name` of a block."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    stack = holder.stack[0] if isinstance(holder, SeparateExperts) else holder
    if isinstance(stack, Experts):
        return stack.down_bias
    bias = getattr(stack.get_submodule(leaf), "bias", None)
    return bias if isinstance(bias, Tensor) else None
