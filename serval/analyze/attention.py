"""Looking at, and changing, what attention layers do: a memory that calls hooks.

`HookedMemory` implements the `Memory` protocol for a few documents, in one step or growing step by
step. It computes exact causal attention and hands each layer's tensors to its hooks, which may
return another output. Nothing here holds a [T, T] tensor: row sums and received mass come from
`kernels.received_mass`, outputs from the attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from serval import kernels
from serval.kernels import jit
from serval.kernels.attention import reference
from serval.kernels.attention_variants import reference as formulas
from serval.models.batch import PackedBatch
from serval.models.memory import Memory, materialise_latent

MASKED = -1e4  # added to a logit: its weight is 0, but where nothing else is seen

ROWS = 256  # query rows of a block, where no kernel walks the keys


@dataclass(eq=False)
class Attention:
    """One attention layer over one document, during one step.

    q: [n, H, D] at positions first..first + n - 1; k: [m, Hkv, D] and v: [m, Hkv, Dv], everything
    the document has stored, m = first + n. Rotary applied. o: [n, H, Dv], the output, already
    changed by the hooks before.
    """

    layer: int
    document: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    first: int
    window: int | None
    sinks: Tensor | None
    o: Tensor
    function: Any = None

    @property
    def normalised(self) -> bool:
        """Whether the weights of a row sum to 1, those of a silent logit or a bias key included."""
        return self.function is None or hasattr(self.function, "column")

    @cached_property
    def _received(self) -> tuple[Tensor, Tensor]:
        return self.received()

    @property
    def mass(self) -> Tensor:
        """What each key receives from these queries: float32 [H, m], summed over queries."""
        return self._received[0]

    @property
    def lse(self) -> Tensor:
        """log of the softmax denominators, a learned sink included: float32 [n, H]."""
        return self._received[1]

    def received(self, queries: int | None = None, sinks: bool = True) -> tuple[Tensor, Tensor]:
        """(mass, lse) of the first `queries` rows among the keys they see. sinks False: rows
        normalised over tokens alone. Where `function` replaces softmax, lse is the log of what the
        rows sum to."""
        rows = self.q.shape[0] if queries is None else queries
        if self.function is not None:
            return self._explicit(rows, normalise=not sinks)
        return kernels.received_mass(
            self.q[:rows],
            self.k[: self.first + rows],
            self.scale,
            first=self.first,
            window=self.window,
            sinks=self.sinks if sinks else None,
            per_head=True,
        )

    def weights_of(self, keys: Tensor) -> Tensor:
        """Attention weights of a few keys: keys int64 [s] -> [n, H, s], 0 where not visible."""
        if self.function is not None:
            parts = [self.block(a)[..., keys] for a in self.blocks()]
            return torch.cat(parts, 1).transpose(0, 1)
        chosen = self.for_queries(self.k[keys])  # [s, H, D]
        z = torch.einsum("nhd,shd->nhs", self.q.float(), chosen.float()) * self.scale
        return (z - self.lse[..., None]).exp() * self.visible(keys)[:, None]

    def visible(self, keys: Tensor) -> Tensor:
        """Which of `keys` [s] each query sees: bool [n, s]."""
        rows = torch.arange(self.first, self.first + self.q.shape[0], device=keys.device)
        age = rows[:, None] - keys[None]
        seen = age >= 0
        return seen if self.window is None else seen & (age < self.window)

    def for_queries(self, x: Tensor) -> Tensor:
        """Keys or values [s, Hkv, D] repeated for the query heads of each group: [s, H, D]."""
        return x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1)

    def attend(self, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """This layer's attention with other keys and values of the same shapes [m, Hkv, ...].

        bias: [m], added to the keys' logits, by one more channel of queries and keys. Returns
        [n, H, Dv].
        """
        if self.function is not None:
            values, parts = v.transpose(0, 1), []
            for rows in self.blocks():
                z = self._logits(rows, k)
                if bias is not None:
                    z = (z + bias).masked_fill(bias <= MASKED, float("-inf"))
                q = self.q[rows].transpose(0, 1)
                parts.append(self.function(z, q, values, self.scale).transpose(0, 1))
            return torch.cat(parts)
        q = self.q
        if bias is not None:
            q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
            column = (bias / self.scale).to(k.dtype)[:, None, None].expand(-1, k.shape[1], 1)
            k = torch.cat([k, column], -1)
        return attend(q, k, v, self.scale, self.first, self.window, self.sinks)

    def blocks(self) -> list[slice]:
        """The query rows in blocks, whose explicit weights may exist at once."""
        n = self.q.shape[0]
        return [slice(a, min(a + ROWS, n)) for a in range(0, n, ROWS)]

    def block(self, rows: slice) -> Tensor:
        """Explicit weights of some query rows: [H, rows, m]."""
        z = self._logits(rows, self.k)
        column = getattr(self.function, "column", None)
        if column is not None:  # a key that is no token
            return formulas.k_bias(z, column(self.q[rows].transpose(0, 1), self.scale))
        return self.function.weights(z)

    def _logits(self, rows: slice, k: Tensor) -> Tensor:
        """Scaled logits [H, rows, m], -inf where not visible."""
        keys = torch.arange(k.shape[0], device=k.device)
        z = torch.einsum("nhd,mhd->hnm", self.q[rows], self.for_queries(k)) * self.scale
        return z.masked_fill(~self.visible(keys)[rows], float("-inf"))

    def _explicit(self, rows: int, normalise: bool) -> tuple[Tensor, Tensor]:
        heads, stored = self.q.shape[1], self.first + rows
        mass = self.q.new_zeros(heads, stored, dtype=torch.float32)
        sums = []
        for part in self.blocks():
            weights = self.block(slice(part.start, min(part.stop, rows)))[..., :stored].float()
            total = weights.sum(-1)
            mass += (weights / (total[..., None] + 1e-8) if normalise else weights).sum(1)
            sums.append(total.T)
            if part.stop >= rows:
                break
        return mass, torch.cat(sums).clamp(min=1e-30).log()


# May return another output [n, H, Dv]; None keeps the present one.
Hook = Callable[[Attention], Tensor | None]
# Changes keys and values before they are stored: (layer, document, first position, k, v) -> (k, v).
Store = Callable[[int, int, int, Tensor, Tensor], tuple[Tensor, Tensor]]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    first: int,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [n, H, D] at positions first.. over k, v [m, Hkv, ...]; no gradients.

    Keys after first + n are not seen. Returns [n, H, Dv]. Never a matrix of all rows and keys.
    """
    n, m = q.shape[0], first + q.shape[0]
    if n == 0:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    if q.device.type == "cpu":
        # one block that holds the whole document, read where it lies
        step = n if jit.load("attention") is not None else ROWS
        table = torch.zeros(1, 1, dtype=torch.int32)
        keys, values = (x[:m].transpose(0, 1)[None].to(q.dtype) for x in (k, v))
        parts = []
        for a in range(0, n, step):
            b = min(a + step, n)
            lens = torch.tensor([first + b], dtype=torch.int32)
            starts = torch.tensor([0, b - a], dtype=torch.int32)
            parts.append(
                kernels.paged_attention(
                    q[a:b], keys, values, table, lens, starts, scale, window, sinks
                )
            )
    else:
        parts = [
            reference.attend(
                q[a : a + ROWS],
                k[: min(first + a + ROWS, m)],
                v[: min(first + a + ROWS, m)],
                scale,
                first + a,
                window,
                sinks,
            )
            for a in range(0, n, ROWS)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class HookedMemory(Memory):
    """Exact attention of some documents, with hooks on every layer.

    Args:
        hooks: called in order with each layer's `Attention` of each document.
        store: changes keys and values on their way into the memory (quantised caches).

    `batch` starts a step; documents grow from step to step. For MLA the latents are expanded and
    hooks see ordinary heads.
    """

    def __init__(self, hooks: Sequence[Hook] = (), store: Store | None = None) -> None:
        self.hooks, self.store = list(hooks), store
        self.lengths: list[int] = []  # of the documents, this step's tokens included
        self._starts: list[int] = [0]
        self._stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def batch(self, counts: Sequence[int], device: torch.device | str | None = None) -> PackedBatch:
        """A step that adds counts[n] tokens to document n. Give every step as many documents as
        the first."""
        past = self.lengths or [0] * len(counts)
        self.lengths = [a + b for a, b in zip(past, counts, strict=True)]
        self._starts = [0, *accumulate(counts)]
        places = zip(past, self.lengths, strict=True)
        return PackedBatch(
            positions=torch.cat([torch.arange(a, b) for a, b in places]).to(device),
            query_starts=torch.tensor(self._starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            memory=self,
        )

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
        weights: Any = None,
    ) -> Tensor:
        """See `serval.models.memory.Memory.attend`; no gradients."""
        parts = []
        for n, (a, b) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            keys, values = k[a:b].detach(), v[a:b].detach()
            if self.store is not None:
                keys, values = self.store(layer, n, self.lengths[n] - (b - a), keys, values)
            if (layer, n) in self._stored:
                past = self._stored[layer, n]
                keys, values = torch.cat([past[0], keys]), torch.cat([past[1], values])
            self._stored[layer, n] = keys, values
            rows, first = q[a:b].detach(), self.lengths[n] - (b - a)
            seen = Attention(
                layer, n, rows, keys, values, scale, first, window, sinks, rows, weights
            )
            seen.o = seen.attend(keys, values)
            for hook in self.hooks:
                changed = hook(seen)
                seen.o = seen.o if changed is None else changed.to(rows.dtype)
            parts.append(seen.o)
        return torch.cat(parts)

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
        q, k, v = materialise_latent(q_nope, q_rope, latent, k_rope, kv_b)
        return self.attend(layer, q, k, v, scale)
