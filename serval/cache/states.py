"""Which sequence has which state, for groups whose layouts keep some of it outside blocks."""

from __future__ import annotations

from collections.abc import Sequence

from serval.cache.tables import Group, SequenceCache
from serval.errors import CacheError


def states_free(groups: Sequence[Group], wanted: Sequence[bool]) -> bool:
    """Whether a state can be had in each group for which one is wanted."""
    left: dict[int, int] = {}
    for want, group in zip(wanted, groups, strict=True):
        if want and group.states is not None:
            free = left.get(id(group.states), group.states.num_free)
            if not free:
                return False
            left[id(group.states)] = free - 1
    return True


def check_states(groups: Sequence[Group], wanted: Sequence[bool]) -> None:
    """Raise `CacheError` unless `states_free`."""
    if not states_free(groups, wanted):
        raise CacheError("all sequence states are in use: free a sequence, or raise max_sequences")


def take_states(groups: Sequence[Group], cache: SequenceCache) -> None:
    """Give a sequence the states it lacks. Raises `CacheError`, having changed nothing."""
    check_states(groups, [state < 0 for state in cache.states])
    for index, group in enumerate(groups):
        if group.states is not None and cache.states[index] < 0:
            cache.states[index] = group.states.allocate()
