"""The decoder: one model definition for training, evaluation and serving, all families."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from serval import kernels
from serval.errors import ConfigError
from serval.models.attention import AttentionSpec, GroupedQueryAttention, LatentAttention, Rotary
from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig
from serval.models.feedforward import GatedMLP
from serval.models.layers import Linear, RMSNorm, RotaryTable
from serval.models.moe import MixtureOfExperts, Router
from serval.models.mtp import MultiTokenPrediction
from serval.models.variants import VariantPart


def make_attention(
    config: ModelConfig, layer: int, index: int
) -> GroupedQueryAttention | LatentAttention:
    if config.mla is not None:
        return LatentAttention(config, config.mla, index)
    return GroupedQueryAttention(config, layer, index)


class StandardBlock(nn.Module):
    """Pre-norm block: attention, then a gated MLP or a mixture of experts."""

    def __init__(
        self, config: ModelConfig, layer: int, first_index: int, *, dense: bool = False
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = make_attention(config, layer, first_index)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp: nn.Module
        if config.moe is not None and not dense and config.is_moe_layer(layer):
            self.mlp = MixtureOfExperts(config, config.moe)
        else:
            self.mlp = GatedMLP(config, config.intermediate_size)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: PackedBatch, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """x: the previous block's last branch [T, D], residual: the stream before it (None: first
        block). Returns the same pair, so that each addition fuses with the norm after it."""
        x, residual = norm_into(self.input_layernorm, x, residual)
        x = self.self_attn(x, batch, rotary)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class ShortcutBlock(nn.Module):
    """Shortcut-connected block (LongCat-Flash, arXiv 2509.01322, fig. 2): two attentions, two dense
    FFNs, one mixture whose input is taken after the first attention and added at the end.

    h1 = x + A0(n(x)); u = n(h1); m = MoE(u); h2 = h1 + F0(u); h3 = h2 + A1(n(h2));
    y = h3 + F1(n(h3)) + m.
    """

    def __init__(self, config: ModelConfig, layer: int, first_index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        assert config.moe is not None
        self.input_layernorm = nn.ModuleList(RMSNorm(hidden, eps) for _ in range(2))
        self.self_attn = nn.ModuleList(
            make_attention(config, layer, first_index + i) for i in range(2)
        )
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(hidden, eps) for _ in range(2))
        self.mlps = nn.ModuleList(GatedMLP(config, config.intermediate_size) for _ in range(2))
        self.mlp = MixtureOfExperts(config, config.moe)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: PackedBatch, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """x: the previous block's last branch [T, D], residual: the stream before it (None: first
        block). Returns the same pair."""
        x, residual = norm_into(self.input_layernorm[0], x, residual)
        x = self.self_attn[0](x, batch, rotary)
        u, residual = norm_into(self.post_attention_layernorm[0], x, residual)
        shortcut = self.mlp(u)
        x, residual = norm_into(self.input_layernorm[1], self.mlps[0](u), residual)
        x = self.self_attn[1](x, batch, rotary)
        x, residual = norm_into(self.post_attention_layernorm[1], x, residual)
        return self.mlps[1](x) + shortcut, residual


def norm_into(norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual) of x, residual [T, D]; residual None counts as zero."""
    return (norm(x), x) if residual is None else cast(RMSNorm, norm).add(x, residual)


class Decoder(nn.Module):
    """A decoder-only language model, described entirely by its `ModelConfig`.

    Module names follow Hugging Face's Llama. Weights are initialised from
    normal(0, initializer_range); norms at one, biases and sinks at zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Set by whoever replaces linears by quantised ones; saved to config.json as it is.
        self.quantization_config: dict[str, Any] | None = None
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        block, per_layer = (ShortcutBlock, 2) if config.block == "shortcut" else (StandardBlock, 1)
        self.layers = nn.ModuleList(
            block(config, layer, layer * per_layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(hidden, config.vocab_size, bias=False)
        )
        rotary_width = config.head_dim if config.mla is None else config.mla.qk_rope_head_dim
        assert rotary_width is not None
        self.rotary = RotaryTable(config.rope, rotary_width, config.max_position_embeddings)
        attentions = config.num_hidden_layers * per_layer
        self.mtp = (
            nn.ModuleList(
                MultiTokenPrediction(
                    config,
                    StandardBlock(
                        config, config.num_hidden_layers - 1, attentions + i, dense=config.mtp_dense
                    ),
                )
                for i in range(config.num_mtp_layers)
            )
            if config.num_mtp_layers
            else None
        )
        if not self.embed_tokens.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                module.weight.normal_(0.0, std)
                bias = getattr(module, "bias", None)
                if isinstance(bias, Tensor):
                    bias.zero_()
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("gate_up_proj", "down_proj"):
                    parameter.normal_(0.0, std)
                elif name in ("sinks", "value_bias"):
                    parameter.zero_()
        for module in self.modules():  # after the linears, some of which they set themselves
            if isinstance(module, VariantPart):
                module.reset_parameters()

    @property
    def attention_modules(self) -> list[GroupedQueryAttention | LatentAttention]:
        """In the order of the memory's `layer` argument; those of the MTP head come last."""
        modules = [
            m for m in self.modules() if isinstance(m, (GroupedQueryAttention, LatentAttention))
        ]
        return sorted(modules, key=lambda m: m.index)

    @property
    def attention_layers(self) -> list[AttentionSpec]:
        """One spec per attention module, in their order."""
        return [m.spec for m in self.attention_modules]

    @property
    def trunk_attention_layers(self) -> list[AttentionSpec]:
        """Those of `attention_layers` that `forward` runs, without the MTP head's."""
        specs = self.attention_layers
        return specs[: len(specs) - self.config.num_mtp_layers]

    def forward(
        self,
        tokens: Tensor | None,
        batch: PackedBatch,
        *,
        embeddings: Tensor | None = None,
        pre_norm: bool = False,
    ) -> Tensor:
        """Hidden states of a packed batch.

        tokens: int64 [T], or None when `embeddings` [T, D] are given instead. Returns [R, D], the
        batch's `logits_rows` (None: all T) after the final norm; all before it when `pre_norm`
        (MTP, drafters).
        """
        if (tokens is None) == (embeddings is None):
            raise ConfigError("Decoder.forward takes either tokens or embeddings, exactly one")
        x = self.embed(tokens) if tokens is not None else embeddings
        assert x is not None
        rotary = self.rotary(x.device)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, rotary)
        if pre_norm:
            return x if residual is None else x + residual
        if batch.logits_rows is not None:
            x = x[batch.logits_rows]
            residual = None if residual is None else residual[batch.logits_rows]
        return norm_into(self.norm, x, residual)[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [T] -> rows of the table [T, D], widened if it is stored narrower than
        what is computed with."""
        return self.embed_tokens(tokens).to(self.norm.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of final-normed hidden states: [R, D] -> [R, vocab_size]."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return kernels.linear(hidden, self.embed_tokens.weight)

    def predict_ahead(
        self, depth: int, hidden: Tensor, next_tokens: Tensor, batch: PackedBatch
    ) -> Tensor:
        """MTP hidden states (before the head's norm) of depth `depth`, see `MultiTokenPrediction`.

        hidden: [T, D] before the final norm, next_tokens: int64 [T], the token after each row.
        """
        if self.mtp is None:
            raise ConfigError("this model has no MTP head (num_mtp_layers is 0)")
        rotary = self.rotary(hidden.device)
        return self.mtp[depth](hidden, self.embed(next_tokens), batch, rotary)
