"""Serval's low-bit key-value caches for users of `transformers`; `PrefixKVCache` is in
`serval.hf_prefixkv`.

    from serval.hf import OScaRCache
    cache = OScaRCache(model.config, bits=2)
    model.generate(**inputs, past_key_values=cache)

The model is not changed. Keys and values are stored as in the engine (`cache.layouts.oscar`):
packed blocks, an exact window, each token quantised once. `transformers` asks a cache for tensors
of keys and values; they are made from the codes for each layer and step and then dropped, which
saves memory, not time. With `model.set_attn_implementation("serval")` attention reads the packed
codes instead.

Left padding: give the inputs' `attention_mask` to the cache, so that padding is not stored at all
and a sequence in a batch is quantised exactly as it is alone. Beam search, `crop` and assisted
generation work; keys and values have no gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from serval.cache.layouts import layout_class
from serval.cache.layouts.base import CacheView
from serval.cache.layouts.oscar import OScaRLayout
from serval.cache.manager import SequenceCache
from serval.cache.memory import PagedMemory, cache_budget
from serval.errors import CacheError
from serval.hf_prefixkv import PrefixKVCache, text_config
from serval.models.attention import AttentionSpec

__all__ = ["OScaRCache", "PrefixKVCache"]

ATTENTION = "serval"  # name of the attention that reads packed codes


class OScaRCache(Cache):
    """A `transformers` cache of few bits, for decoder-only models with grouped-query attention.

    Args:
        config: the model's; sliding-window layers keep their window exactly, as `DynamicCache`
            does, other kinds of layers than these and full attention raise CacheError.
        bits, value_bits, residual, zero, sinks: options of the layout, see
            `cache.layouts.oscar.OScaRLayout`.
        attention_mask: of the prompts, int or bool [B, T], when they are padded on the left.
        layout: another low-bit layout with its options, such as "kivi:residual=64"; those above
            must then keep their defaults.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 2,
        value_bits: int = 0,
        residual: int = 128,
        zero: str = "int",
        sinks: int = 0,
        attention_mask: Tensor | None = None,
        layout: str | None = None,
    ) -> None:
        options = {"bits": bits, "value_bits": value_bits, "residual": residual, "zero": zero}
        chosen = ",".join(f"{key}={value}" for key, value in {**options, "sinks": sinks}.items())
        if layout is not None and (bits, value_bits, residual, zero, sinks) != (
            2,
            0,
            128,
            "int",
            0,
        ):
            raise CacheError(
                f"OScaRCache got layout={layout!r} and options of its own; write them into layout, "
                "such as 'kivi:bits=4,residual=64'"
            )
        kv = layout or f"oscar:{chosen}"
        if not issubclass(layout_class(kv), OScaRLayout):
            raise CacheError(
                f"OScaRCache holds oscar, kivi, int4, int2 and q4_0 layouts, not {kv!r}"
            )
        padding = None if attention_mask is None else _left_padding(attention_mask)
        text = text_config(config)
        window = getattr(text, "sliding_window", None)
        kinds = (
            getattr(text, "layer_types", None)
            or ["full_attention" if window is None else "sliding_attention"]
            * text.num_hidden_layers
        )
        super().__init__(layers=[_layer(kind, kv, padding, window, text) for kind in kinds])

    def reset(self, attention_mask: Tensor | None = None) -> None:
        """Forget all tokens and the padding of the prompts before, for a batch of any size.

        attention_mask: of the next prompts, int or bool [B, T], when they are padded on the left.
        """
        padding = None if attention_mask is None else _left_padding(attention_mask)
        for n, layer in enumerate(self.layers):
            if isinstance(layer, OScaRCacheLayer):
                layer.reset(padding)
            elif isinstance(layer, DynamicSlidingWindowLayer):  # its reset keeps rows of zeros
                self.layers[n] = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers as they are stored, room for growth included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, OScaRCacheLayer))


def _layer(
    kind: str, kv: str, padding: list[int] | None, window: int | None, config: Any
) -> CacheLayerMixin:
    if kind == "full_attention":
        return OScaRCacheLayer(kv, padding, config)
    if kind == "sliding_attention" and window is not None:
        return DynamicSlidingWindowLayer(sliding_window=window)
    raise CacheError(
        f"OScaRCache does not support layers of kind {kind!r}; it serves full and sliding-window "
        "attention"
    )


def _left_padding(mask: Tensor) -> list[int]:
    """How many tokens of each row of a mask [B, T] are padding; all must be on the left."""
    seen = mask.to(torch.bool)
    padding = (~seen).sum(1)
    expected = torch.arange(seen.shape[1], device=seen.device) >= padding[:, None]
    if not torch.equal(seen, expected):
        raise CacheError(
            "attention_mask has zeros after ones; OScaRCache takes padding on the left only "
            "(tokenizer.padding_side = 'left')"
        )
    return [int(count) for count in padding]


class OScaRCacheLayer(CacheLayerMixin):
    """One layer's sequences. kv: the layout; padding: left padding of each, None: none; config: the
    model's, whose attention is asked for at each step."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, kv: str, padding: Sequence[int] | None = None, config: Any = None) -> None:
        super().__init__()
        self.kv, self.config = kv, config
        self._given_padding = padding
        self.length = 0  # tokens per sequence, padding included
        self.padding: list[int] = []
        self.sequences: list[SequenceCache] = []
        self.memory: PagedMemory | None = None

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        spec = AttentionSpec("gqa", heads, heads, dim, value_states.shape[-1])
        kind = layout_class(self.kv)
        assert issubclass(kind, OScaRLayout)
        size, dtype = kind.residual, key_states.dtype
        self.memory = PagedMemory(
            [spec],
            self.kv,
            cache_bytes=cache_budget(
                [spec], self.kv, dtype, blocks=batch, block_size=size, sequences=batch
            ),
            max_model_len=1,
            block_size=size,
            dtype=dtype,
            device=key_states.device,
            prefix_caching=False,
            max_sequences=batch,
        )
        self.dtype, self.device = dtype, key_states.device
        self.is_initialized = True

    def _start(self, batch: int) -> None:
        """Sequences of a batch, empty."""
        padding = list(self._given_padding or [0] * batch)
        if len(padding) != batch:
            raise CacheError(
                f"attention_mask has {len(padding)} rows, the batch {batch}: give OScaRCache "
                "the mask of the sequences that are computed (beam search repeats each)"
            )
        self._room(0, batch)
        self.padding = padding
        self.sequences = [self._manager.create() for _ in range(batch)]

    @torch.no_grad()
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store k [B, Hkv, T, D] and v [B, Hkv, T, Dv] and return the keys and values of all
        tokens; where the attention is Serval's, what it needs to do both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.sequences:
            self._start(key_states.shape[0])
        if key_states.shape[0] != len(self.sequences):
            raise CacheError(
                f"a batch of {key_states.shape[0]} met a cache of {len(self.sequences)} sequences"
            )
        step = _Step(self, key_states, value_states)
        self.length += key_states.shape[2]
        if getattr(self.config, "_attn_implementation", None) == ATTENTION:
            return step.tagged()
        return step.expanded()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self, padding: Sequence[int] | None = None) -> None:
        """Forget everything; padding: of the next sequences, None: none."""
        for cache in self.sequences:
            self._manager.free(cache)
        self.sequences, self.padding, self.length = [], [], 0
        self._given_padding = padding

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: -n drops n of them; a positive number is the length to keep."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.length)
        self.length = max(0, self.length + tokens_to_remove)
        for cache, padding in zip(self.sequences, self.padding, strict=True):
            self._manager.truncate(cache, min(cache.num_tokens, max(0, self.length - padding)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = len(self.sequences)
        self.batch_select_indices(torch.arange(count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that are named, as often as they are named; copies share blocks."""
        if not self.sequences:
            return
        chosen = indices.tolist()
        for unwanted in set(range(len(self.sequences))) - set(chosen):
            self._manager.free(self.sequences[unwanted])
        self._room(0, len(chosen))
        taken: Counter[int] = Counter()
        made = []
        for index in chosen:
            cache = self.sequences[index]
            made.append(self._manager.fork(cache) if taken[index] else cache)
            taken[index] += 1
        self.sequences = made
        self.padding = [self.padding[index] for index in chosen]

    def offload(self) -> None:
        raise CacheError("OScaRCache does not offload to the CPU; its point is to fit")

    @property
    def batch_size(self) -> int:
        return len(self.sequences)

    @property
    def nbytes(self) -> int:
        """Bytes stored, room for growth included."""
        return 0 if self.memory is None else self.memory.nbytes

    # What a step needs

    @property
    def layout(self) -> OScaRLayout:
        assert self.memory is not None
        layout = self.memory.layouts[0]
        assert isinstance(layout, OScaRLayout)
        return layout

    @property
    def _manager(self) -> Any:
        assert self.memory is not None
        return self.memory.manager

    def begin(self, counts: Sequence[int]) -> CacheView:
        """Make room for counts[n] more tokens of sequence n, and start a step with those that have
        some."""
        live = [n for n, count in enumerate(counts) if count]
        assert self.memory is not None
        blocks = sum(sum(self._manager.blocks_needed(self.sequences[n], counts[n])) for n in live)
        self._room(blocks, len(self.sequences))
        for n in live:
            self._manager.append(self.sequences[n], counts[n])
        self.memory.batch([self.sequences[n] for n in live], [counts[n] for n in live])
        return self.memory.current[0]

    def _room(self, blocks: int, states: int) -> None:
        """Grow storage so that `blocks` more can be taken and `states` exist."""
        group = self._manager.groups[0]
        pool, layout = group.pool, self.layout
        total = pool.num_blocks
        if blocks > pool.num_free:
            total += max(blocks - pool.num_free, total // 4)
        if total > pool.num_blocks or states > layout.num_states:
            layout.grow(total, states)
            pool.grow(total)
            group.states.grow(layout.num_states)


class _Step:
    """New tokens of a layer: k [B, Hkv, T, D], v [B, Hkv, T, Dv], of which rows on the left may be
    padding."""

    def __init__(self, layer: OScaRCacheLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.new, self.old = k.shape[2], layer.length
        left = [max(0, padding - self.old) for padding in layer.padding]
        self.counts = [max(0, self.new - skipped) for skipped in left]

    def packed(self, x: Tensor) -> Tensor:
        """Real rows of x [B, H, T, D]: [sum of counts, H, D]."""
        x = x.transpose(1, 2)
        if min(self.counts) == self.new:
            return x.flatten(0, 1)
        return torch.cat([x[n, self.new - count :] for n, count in enumerate(self.counts)])

    def padded(self, rows: Tensor) -> Tensor:
        """The inverse, with zeros at padding: [B, T, H, D]."""
        if min(self.counts) == self.new:
            return rows.unflatten(0, (-1, self.new))
        out = rows.new_zeros(len(self.counts), self.new, *rows.shape[1:])
        parts = rows.split(self.counts)
        for n, (part, count) in enumerate(zip(parts, self.counts, strict=True)):
            out[n, self.new - count :] = part
        return out

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Store, and return keys and values of all tokens, old ones from their codes."""
        layer, layout = self.layer, self.layer.layout
        total = self.old + self.new
        shapes = [(*x.shape[:2], total, x.shape[3]) for x in (self.k, self.v)]
        keys, values = (self.k.new_zeros(shape) for shape in shapes)
        keys[:, :, self.old :], values[:, :, self.old :] = self.k, self.v
        for n, cache in enumerate(layer.sequences):
            if cache.num_tokens:
                old_k, old_v = layout.read(
                    0, cache.tables[0].ids, cache.states[0], cache.num_tokens
                )
                span = slice(self.old - cache.num_tokens, self.old)
                keys[n, :, span] = old_k.transpose(0, 1).to(keys.dtype)
                values[n, :, span] = old_v.transpose(0, 1).to(values.dtype)
        if any(self.counts):
            view = layer.begin(self.counts)
            layout.store(0, view, self.packed(self.k), self.packed(self.v))
        return keys, values

    def tagged(self) -> tuple[Tensor, Tensor]:
        """The new keys and values, with this step for `packed_attention`."""
        tagged = self.k.view_as(self.k)
        tagged.serval_step = self  # type: ignore[attr-defined]
        return tagged, self.v

    def attend(self, q: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        """q [B, H, T, D] -> [B, T, H, Dv], reading codes as they are stored; stores the step."""
        if not any(self.counts):
            return q.new_zeros(q.shape[0], self.new, q.shape[1], self.v.shape[3])
        view = self.layer.begin(self.counts)
        q, k, v = (self.packed(x) for x in (q, self.k, self.v))
        return self.padded(self.layer.layout.step(0, view, q, k, v, scale, None, sinks))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention "serval": over packed codes for layers of an OScaRCache, else torch's.

    query: [B, H, T, D]. Returns [B, T, H, Dv]. Raises CacheError for what it cannot honour.
    """
    step: _Step | None = getattr(key, "serval_step", None)
    if softcap is not None or (s_aux is not None and step is None):
        raise CacheError(
            f"attention {ATTENTION!r} does not support "
            f"{'softcap' if softcap is not None else 'sinks outside an OScaRCache'}; use "
            "model.set_attn_implementation('eager')"
        )
    if step is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    _check_mask(attention_mask, step)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.attend(query, scale, s_aux).to(query.dtype), None


def _check_mask(mask: Tensor | None, step: _Step) -> None:
    """Padding is not stored, so the mask must hide that and nothing else. No mask hides nothing."""
    found = [0]
    if mask is not None:
        last = mask[:, 0, -1]  # [B or 1, L]
        hidden = ~last if last.dtype == torch.bool else last < 0
        found = hidden.sum(-1).tolist()
    expected = [min(padding, step.layer.length) for padding in step.layer.padding]
    if any(a != b for a, b in zip(found * (len(expected) // len(found)), expected, strict=True)):
        raise CacheError(
            f"the attention mask hides {found} tokens, the cache left out {expected} as padding; "
            "give OScaRCache the attention_mask of the prompts"
        )


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
