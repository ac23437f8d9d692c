"""PrefixKV: "Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
Efficient Generation" (arXiv 2412.03409).

Importance of token n to layer l is the attention it received, I_l[n] = sum_i mean_h A_l[h, i, n].
With s_l = I_l / sum I_l in falling order and P_l its cumulative sum, layer l keeps

    o_l(p) = min{o : P_l[o] >= p},    sum_l o_l(p) = r L N,

for the one p that meets the budget: every layer keeps the same share of its information. Kept are
the first token, the last, and the most important of the rest, in their order and at their true
positions. While decoding, a layer that exceeds its share by an entry drops the one at slot
e_l = o_l - 25: first the last kept prompt entries, then the oldest generated ones.

The shares hardly depend on the input, so they can be measured once (`serval profile-kv`, "offline")
and reused; without a profile they are found for every prompt ("online").

Decided here: the budget is met exactly (the official code rescales and truncates); a token's true
position is used (the official code takes the compressed length of layer 0); a drop happens when the
token that would exceed the share arrives, so the cache never holds more; budgets of short texts do
not fall below `least` entries per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serval.cache.policies.allocators import Allocator, PrefixAllocator, ProportionalAllocator
from serval.cache.policies.base import Policy
from serval.cache.policies.profile import Profile, fingerprint
from serval.errors import CacheError
from serval.models.attention import AttentionSpec


@dataclass
class PrefixKV(Policy):
    """PrefixKV.

    profile: a file that `serval profile-kv` wrote; its fractions per layer replace the search. It
    must have been made for this model and this `keep`.
    """

    name = "prefixkv"
    profile: str = ""
    _fractions: Sequence[float] = field(default=(), init=False, repr=False)

    def bind(self, specs: Sequence[AttentionSpec]) -> None:
        if not self.profile:
            return
        found = Profile.read(Path(self.profile))
        if found.method != self.name:
            raise CacheError(f"{self.profile} is a profile of {found.method!r}, not of 'prefixkv'")
        if abs(found.keep - self.keep) > 1e-9:
            raise CacheError(
                f"{self.profile} was made for keep={found.keep}, the policy has keep={self.keep}: "
                "give that, or make another with `serval profile-kv MODEL --keep "
                f"{self.keep}`"
            )
        if found.fingerprint != fingerprint(specs):
            raise CacheError(
                f"{self.profile} was made for {found.model!r} with {len(found.fractions)} "
                f"attention layers; this model's {len(specs)} layers are others: make a profile "
                "with `serval profile-kv MODEL`"
            )
        if len(found.fractions) != len(specs):
            raise CacheError(
                f"{self.profile} is a damaged cache profile: it has {len(found.fractions)} "
                f"fractions for {len(specs)} attention layers; make another with `serval "
                f"profile-kv MODEL --keep {self.keep}`"
            )
        self._fractions = found.fractions

    @property
    def allocator(self) -> Allocator:
        if self._fractions:
            return ProportionalAllocator(self._fractions)
        return PrefixAllocator()
