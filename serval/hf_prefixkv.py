"""PrefixKV and the other cache policies for users of `transformers`.

    from serval.hf_prefixkv import PrefixKVCache
    model.set_attn_implementation("serval-policy")
    cache = PrefixKVCache(model.config, keep=0.2)
    model.generate(**inputs, past_key_values=cache)

The prompt is computed exactly, with torch's attention; what each token is worth comes from the
queries, which is why the attention implementation has to be this one. With the first single token
after the prompt, every layer is cut to what the policy keeps. From then on layers differ in length;
positions stay true, because the cache reports the tokens seen, not those kept. Decoding holds the
shares, as in the engine.

Batches are rectangular: layers share counts between sequences, each sequence keeps its own tokens.
Padding on the left is worth nothing and is masked where a short sequence has to keep some.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from serval.cache.policies import make_policy
from serval.cache.policies.base import Policy
from serval.cache.policies.scorers import Scorer
from serval.cache.tables import Retention
from serval.errors import CacheError
from serval.models.attention import AttentionSpec

ATTENTION = "serval-policy"
_TAG = "_serval_layer"  # attribute of the keys that `update` returns


def text_config(config: Any) -> Any:
    """The part of a `transformers` config that describes the decoder; raises CacheError for what is
    no config."""
    if not hasattr(config, "get_text_config"):
        raise CacheError(
            f"expected a transformers config, such as model.config, got {type(config).__name__}"
        )
    return config.get_text_config(decoder=True)


class PrefixKVCache(Cache):
    """A `transformers` cache under a policy, for decoder-only models with grouped-query attention.

    Args:
        config: the model's. Sliding-window layers keep their window, as `DynamicCache` does; other
            kinds of layers than these and full attention raise CacheError.
        keep: fraction of the entries that is kept. policy: another policy with its options, such as
            "h2o:keep=0.3" or "prefixkv:keep=0.2,profile=FILE"; leave `keep` out then.
    """

    def __init__(
        self, config: Any, keep: float | None = None, policy: str | Policy | None = None
    ) -> None:
        if keep is not None and policy is not None:
            raise CacheError(
                f"PrefixKVCache got keep={keep} and policy={policy!r}: write keep into the policy"
            )
        text = text_config(config)
        self.policy = make_policy(policy or f"prefixkv:keep={0.2 if keep is None else keep}")
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None) or (
            ["full_attention" if window is None else "sliding_attention"] * text.num_hidden_layers
        )
        super().__init__(layers=[_layer(kind, window, self.policy) for kind in kinds])
        self._mine = [layer for layer in self.layers if isinstance(layer, PolicyLayer)]
        if not self._mine:
            raise CacheError("no layer of this model has full attention: a policy has no use")
        self.policy.bind([_spec(text)] * len(self._mine))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add k [B, Hkv, T, D] and v [B, Hkv, T, Dv]; returns what attention reads, in any order
        but with the new tokens last where there are several."""
        mine = self._mine[0]
        begins = self.layers[layer_idx] is mine  # of a pass: the layers have seen the same tokens
        if begins and key_states.shape[2] == 1 and mine.seen and mine.importance is not None:
            self.compress()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forget all tokens; the next prompt is one of a new cache."""
        for n, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):  # its reset keeps rows of zeros
                self.layers[n] = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
            else:
                layer.reset()

    @torch.no_grad()
    def compress(self) -> None:
        """The prompt is complete: drop what the policy does not keep. Called by itself before the
        first single token."""
        first = self._mine[0]
        if first.importance is None:
            raise CacheError("there is no prompt to compress, or it is compressed already")
        missing = [n for n, layer in enumerate(self._mine) if not layer.scored]
        if missing:
            raise CacheError(
                f"layers {missing} were computed without {ATTENTION!r} attention, which measures "
                f"importance: call model.set_attn_implementation({ATTENTION!r}) before generate"
            )
        length, windows = first.seen, [None] * len(self._mine)
        if self.policy.drops(length, windows):
            scores = [layer.importance for layer in self._mine]
            shared = torch.stack([_ranked(score) for score in scores if score is not None])
            counts = self.policy.allocate(shared, windows)
            places = [torch.arange(count) for count in counts]
        else:
            counts, places = [length] * len(self._mine), None
        retention = self.policy.retention(places, length, windows, [False] * len(self._mine))
        for n, (layer, count) in enumerate(zip(self._mine, counts, strict=True)):
            layer.keep(self.policy, count, retention if self.policy.keep < 1 else None, n)

    @property
    def kept(self) -> list[int]:
        """Entries per sequence that each layer under the policy holds."""
        return [layer.entries for layer in self._mine]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the layers under the policy."""
        return sum(layer.nbytes for layer in self._mine)


def _layer(kind: str, window: int | None, policy: Policy) -> CacheLayerMixin:
    if kind == "full_attention":
        return PolicyLayer(policy.scorer)
    if kind == "sliding_attention" and window is not None:
        return DynamicSlidingWindowLayer(sliding_window=window)
    raise CacheError(
        f"PrefixKVCache does not support layers of kind {kind!r}; it serves full and "
        "sliding-window attention"
    )


def _spec(config: Any) -> AttentionSpec:
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return AttentionSpec("gqa", heads, shared, dim, dim)


def _ranked(importance: Tensor) -> Tensor:
    """Importance [B, N] as one falling curve [N]: the mean of the sequences' normalised ones."""
    curves = importance.double().sort(dim=1, descending=True).values
    return (curves / curves.sum(1, keepdim=True).clamp(min=1e-30)).mean(0)


class PolicyLayer(CacheLayerMixin):
    """One layer: keys [B, Hkv, n, D], values [B, Hkv, n, Dv], and which entries are no padding."""

    is_sliding = False

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = scorer
        self.seen = 0  # tokens, padding included
        self.valid: Tensor | None = None  # bool [B, n]; None: all
        self.importance: Tensor | None = None  # float32 [B, n], until the prompt is complete
        self.scored = False
        self._retention: Retention | None = None
        self._index = 0

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.importance = torch.zeros(key_states.shape[0], 0, device=self.device)
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        new, place = key_states.shape[2], None
        if self._retention is not None and new == 1:
            place = self._retention.victim(self._index, self.entries, self.seen + 1)
        if place is not None and self._retention is not None:
            self.keys[:, :, place] = key_states[:, :, 0]
            self.values[:, :, place] = value_states[:, :, 0]
            if self.valid is not None:
                self.valid[:, place] = True
            self._retention.turn(self._index, self.seen + 1)
        else:
            if self._retention is not None:
                self._retention.extend(self._index, self.entries, self.seen, new)
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            if self.valid is not None:
                self.valid = F.pad(self.valid, (0, new), value=True)
            if self.importance is not None:
                self.importance = F.pad(self.importance, (0, new))
        self.seen += new
        keys = self.keys.view(self.keys.shape)  # an object of this step, to carry the tag
        setattr(keys, _TAG, self)
        return keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self._scorer)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            count = self.keys.shape[0]
            self.batch_select_indices(torch.arange(count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that are named, as often as they are named."""
        for name in ("keys", "values", "valid", "importance"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheError(
            "a cache under a policy cannot be cropped, since tokens were dropped: use a cache "
            "without a policy for assisted generation"
        )

    # What the policy needs

    @property
    def entries(self) -> int:
        """Entries per sequence."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None)

    def add_importance(self, q: Tensor, scale: float, seen: Tensor | None) -> None:
        """Add what the queries q [B, H, T, D] of this step, the last tokens, say of the keys.
        seen: bool [B, n], False at padding on the left (None: there is none)."""
        assert self.importance is not None
        assert self.keys is not None
        self.scored = True
        first = self.seen - q.shape[2]
        if seen is not None:
            self.valid = seen
        for n in range(q.shape[0]):
            pad = 0 if seen is None else int((~seen[n]).sum())
            count = q.shape[2]
            rows = max(0, pad - first, self._scorer.skipped(first, count, self.seen))
            if self._scorer.queries:  # those of an earlier step were not the last
                self.importance[n] = 0
            if rows < count:
                self.importance[n, pad:] += self._scorer.score(
                    q[n, :, rows:].transpose(0, 1),
                    self.keys[n, :, pad:].transpose(0, 1),
                    scale,
                    max(0, first + rows - pad),
                )

    def keep(self, policy: Policy, count: int, retention: Retention | None, index: int) -> None:
        """Cut every sequence to `count` entries, and hold the share from now on."""
        assert self.importance is not None
        assert self.keys is not None
        assert self.values is not None
        if count < self.seen:
            chosen = torch.stack(
                [self._select(policy, n, count) for n in range(len(self.importance))]
            ).to(self.keys.device)
            at = chosen[:, None, :, None]
            self.keys, self.values = (
                x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
                for x in (self.keys, self.values)
            )
            if self.valid is not None:
                self.valid = self.valid.gather(1, chosen)
        self.importance = None
        self._retention, self._index = retention, index

    def _select(self, policy: Policy, n: int, count: int) -> Tensor:
        """Positions that sequence n keeps; padding leads where it has too few of its own."""
        assert self.importance is not None
        pad = 0 if self.valid is None else int((~self.valid[n]).sum())
        own = self.importance[n, pad:]
        chosen = policy.select(own, min(count, len(own)), None).cpu() + pad
        return torch.cat([torch.arange(count - len(chosen)), chosen])

    def mask(self, queries: int) -> Tensor | None:
        """What the queries of this step see, bool [B, 1, queries, n]; None: everything."""
        if queries == 1 and self.valid is None:
            return None
        assert self.keys is not None
        count = self.entries
        age = torch.arange(queries)[:, None] + count - queries - torch.arange(count)
        causal = (age >= 0).to(self.keys.device)[None, None]
        return causal if self.valid is None else causal & self.valid[:, None, None]


def policy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's attention of query [B, H, T, D], which also tells the cache's layer what each key
    received. Arguments as of `transformers`' attention functions."""
    if kwargs.get("s_aux") is not None:
        raise CacheError(f"{ATTENTION!r} attention does not support this model's learned sinks")
    layer: PolicyLayer | None = getattr(key, _TAG, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer is not None:
        if layer.importance is None:
            attention_mask = layer.mask(query.shape[2])
        else:
            seen = _seen(attention_mask, query.shape[0])
            layer.add_importance(query, scale, seen)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scale, **kwargs
    )


def _seen(mask: Tensor | None, batch: int) -> Tensor | None:
    """Which keys the last query sees, bool [B, n], from a mask [B, 1, T, n]; None: all."""
    if mask is None:
        return None
    last = mask[:, 0, -1]
    last = last if last.dtype == torch.bool else last >= 0
    return None if bool(last.all()) else last.expand(batch, -1)


AttentionInterface.register(ATTENTION, policy_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
