"""How a fresh decoder's weights are drawn; a recipe picks one by name.

normal: everything from normal(0, initializer_range), as `Decoder` does by itself.

mimetic (arXiv 2305.09828, "Mimetic Initialization of Self-Attention Layers"): products of
attention matrices start near the identity, as they end up in trained models. Here, for
grouped-query attention of head width d over hidden size D: W_k, W_v ~ normal(0, 1/D); the first
query head of each group starts equal to its key head, so that it attends to equal tokens; the
output slice of every head is W_v^T / 2, so that what is attended to is copied. Meant for small
models that should learn to retrieve from their context in few steps; its effect here was not
separated from other changes. The paper's convex mix with noise is left out: the random
projections bring their own. Layers without such heads (MLA) keep the normal draw.
"""

from __future__ import annotations

import torch

from serval.models.attention import GroupedQueryAttention
from serval.models.decoder import Decoder
from serval.registry import Entry


def normal(decoder: Decoder) -> None:
    """Draw every weight from normal(0, initializer_range) again."""
    decoder.reset_parameters()


@torch.no_grad()
def mimetic(decoder: Decoder) -> None:
    """Normal weights, then attention products near the identity."""
    decoder.reset_parameters()
    for module in decoder.modules():
        if isinstance(module, GroupedQueryAttention):
            _mimetic_attention(module, decoder.config.hidden_size)


def _mimetic_attention(attention: GroupedQueryAttention, hidden: int) -> None:
    heads, groups = attention.num_heads, attention.num_key_value_heads
    width, per_group = attention.head_dim, heads // groups
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.normal_(0.0, hidden**-0.5)
    q = attention.q_proj.weight.view(groups, per_group, width, hidden)
    q[:, 0] = attention.k_proj.weight.view(groups, width, hidden)
    v = attention.v_proj.weight.view(groups, width, hidden)
    out = attention.o_proj.weight.view(hidden, groups, per_group, width)
    out.copy_(0.5 * v.permute(2, 0, 1).unsqueeze(2).expand_as(out))


INITIALIZERS: dict[str, Entry] = {
    "normal": Entry("serval.models.initialize:normal", "independent normal weights"),
    "mimetic": Entry(
        "serval.models.initialize:mimetic", "attention products near identity", "2305.09828"
    ),
}
