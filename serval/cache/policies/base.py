"""The policy seam: which tokens of a prompt each layer keeps, and what happens while text grows.

A policy is a scorer (what a token is worth to a layer), an allocator (how many entries each layer
gets of one budget for all) and a rule for which entries are protected. Its dataclass fields are the
options of the command line (`--policy prefixkv:keep=0.2`). To add one: subclass `Policy`, set or
override `scorer` and `allocator`, and add a line to `POLICIES`.

Budget of a sequence of `total` tokens in L layers: keep * L * total entries, but never fewer than
`least` per layer on average, since a short text has nothing to spare. Shares of it are fixed when
the prompt is complete; decoding holds every layer at its share.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from serval.cache.policies.allocators import Allocator
from serval.cache.policies.scorers import ReceivedAttention, Scorer
from serval.cache.tables import Retention
from serval.errors import CacheError
from serval.models.attention import AttentionSpec

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass
class Policy(ABC):
    """What is kept of keys and values.

    Args:
        keep: fraction of all entries that is kept, in (0, 1].
        start: first tokens that every layer keeps.
        last: last prompt tokens that every layer keeps when the prompt is complete.
        recent: share of a layer's entries that are its last tokens whatever their importance, in
            [0, 1); a window of that size then moves on while decoding.
        distance: entries at the end of what is kept that decoding may drop, oldest first; the ones
            before stay for good. Half of the entries where there are fewer.
        least: entries per layer below which no budget falls.
        queries: only so many last queries of a prompt say what its tokens are worth; 0: all. A fact
            that only the question asks for is worth nothing to the queries before it.

    Raises `CacheError` for values out of range, and for other values than the defaults of options
    that the policy has no use for (`unused`).
    """

    name: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()
    keep: float = 0.2
    start: int = 1
    last: int = 1
    recent: float = 0.0
    distance: int = 25
    least: int = 32
    queries: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in self.unused and getattr(self, field.name) != field.default:
                raise self._unknown(field.name)
        if not 0 < self.keep <= 1:
            raise CacheError(
                f"policy {self.name!r} got keep={self.keep}; it is the fraction that is kept: "
                "above 0, at most 1"
            )
        if not 0 <= self.recent < 1:
            raise CacheError(
                f"policy {self.name!r} got recent={self.recent}; it is a share of a layer's "
                "entries: at least 0, below 1"
            )
        for option, bound in {
            "start": 0,
            "last": 1,
            "distance": 1,
            "least": 0,
            "queries": 0,
        }.items():
            if getattr(self, option) < bound:
                raise CacheError(
                    f"policy {self.name!r} got {option}={getattr(self, option)}; it expects at "
                    f"least {bound}"
                )

    @classmethod
    def options(cls) -> list[str]:
        """What may be set."""
        fields = dataclasses.fields(cls)
        return [field.name for field in fields if field.init and field.name not in cls.unused]

    @classmethod
    def _unknown(cls, key: str) -> CacheError:
        known = ", ".join(cls.options())
        return CacheError(f"policy {cls.name!r} has no option {key!r}; it has: {known}")

    @classmethod
    def configure(cls, given: Mapping[str, str]) -> Policy:
        """This policy with options from text. Raises `CacheError` for an option it lacks or a value
        of the wrong type."""
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in given.items():
            if key not in cls.options():
                raise cls._unknown(key)
            kind: Any = type(defaults[key])
            try:
                values[key] = _BOOLEANS[text.lower()] if kind is bool else kind(text)
            except (ValueError, KeyError):
                raise CacheError(
                    f"option {key!r} of policy {cls.name!r} takes a {kind.__name__}, got {text!r}"
                ) from None
        return cls(**values)

    @property
    def scorer(self) -> Scorer:
        """What a token is worth."""
        return ReceivedAttention(self.queries)

    @property
    @abstractmethod
    def allocator(self) -> Allocator:
        """How the budget is split."""

    def bind(self, specs: Sequence[AttentionSpec]) -> None:
        """Called once with the layers of the model that it will serve. Raises `CacheError` when
        they are not those that the options were made for."""
        return None

    def last_ones(self, kept: int) -> int:
        """Of `kept` entries of a layer, how many are its last tokens, whatever their importance."""
        return max(min(self.last, kept), int(kept * self.recent))

    def budget(self, total: int, layers: int) -> int:
        """Entries that `layers` layers keep of `total` tokens."""
        fewest = min(total, max(self.least, self.start + self.last + 1))
        return min(layers * total, max(round(self.keep * layers * total), layers * fewest))

    def drops(self, length: int, windows: Sequence[int | None]) -> bool:
        """Whether a prompt of `length` tokens loses any in layers with these windows."""
        if self.keep == 1:
            return False
        layers = len(windows)
        narrow = any(window is not None and window < length for window in windows)
        return narrow or self.budget(length, layers) < layers * length

    def allocate(self, importance: Tensor, windows: Sequence[int | None]) -> list[int]:
        """Entries per layer of a prompt whose importance is [L, N]: the budget, exactly, unless
        windows are too narrow for it."""
        layers, length = importance.shape
        upper = [length if window is None else min(window, length) for window in windows]
        lower = [min(high, self.start + self.last + 1) for high in upper]
        total = self.budget(length, layers)
        visible = importance
        if min(upper) < length:  # what no later query sees is worth nothing
            visible = importance.clone()
            for layer, high in enumerate(upper):
                visible[layer, : length - high] = 0
        return self.allocator.allocate(visible, total, lower, upper)

    def select(self, importance: Tensor, kept: int, window: int | None) -> Tensor:
        """Which tokens a layer keeps: int64 [kept], rising.

        importance: [N]. The last ones, then the first ones, then by importance (ties: the earlier).
        Tokens that left a `window` are not kept.
        """
        length = importance.shape[0]
        oldest = 0 if window is None else max(0, length - window)
        worth = importance.double()
        worth[:oldest] = -1.0
        worth[length - self.last_ones(kept) :] = float("inf")
        if oldest == 0:
            room = kept - self.last_ones(kept)
            head = slice(0, min(self.start, room))
            worth[head] = float("inf")
        order = worth.sort(descending=True, stable=True).indices
        return order[:kept].sort().values

    def retention(
        self,
        kept: Sequence[Tensor] | None,
        length: int,
        windows: Sequence[int | None],
        fixed: Sequence[bool],
    ) -> Retention:
        """How a sequence is held at its shares from now on.

        Args:
            kept: positions that each layer kept of the prompt, or None for all.
            length: tokens of the prompt.
            windows: of the layers. fixed: layers that cannot drop single entries.
        """
        layers = len(windows)
        positions = [torch.arange(length)] * layers if kept is None else list(kept)
        counts = [len(some) for some in positions]
        whole = sum(counts)
        rates, floors = [], []
        queues: list[deque[int] | None] = []
        ages: list[deque[int] | None] = []
        fewest = max(self.least, self.start + self.last + 1)
        for layer, (count, window) in enumerate(zip(counts, windows, strict=True)):
            share = count / whole * layers
            rates.append(share * self.keep)
            floors.append(share * fewest)
            if fixed[layer]:
                queues.append(None)
                ages.append(None)
                continue
            first = 0 if window is not None else self.first_to_drop(count)
            queues.append(deque(range(first, count)))
            some = positions[layer][first:].tolist() if window is not None else None
            ages.append(None if some is None else deque(some))
        return Retention(rates, floors, queues, ages, list(windows))

    def first_to_drop(self, kept: int) -> int:
        """Of `kept` entries in order, the first that decoding may drop."""
        first = kept - max(self.distance, self.last_ones(kept))
        return first if first >= 1 else kept // 2
