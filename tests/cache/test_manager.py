"""The pool and the tables under random use: the books agree after every action."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serval.cache.manager import CacheManager, Group, SequenceCache
from serval.cache.pool import BlockPool, chain_key
from serval.errors import CacheError

SIZE = 4


class CacheMachine(RuleBasedStateMachine):
    """Sequences of tokens from a small alphabet, so that prefixes meet often. `contents` mimics the
    storage: what was written into every block of every group. A group with a delay keeps up to
    `delay` tokens in `waiting`, the states, before it writes them into blocks."""

    @initialize(
        blocks=st.integers(2, 12),
        delays=st.lists(st.sampled_from([0, 0, SIZE, 2 * SIZE]), min_size=1, max_size=3),
        shared=st.booleans(),
        states=st.integers(1, 4),
    )
    def start(self, blocks: int, delays: list[int], shared: bool, states: int) -> None:
        pool = BlockPool(blocks)
        pools = [pool if shared else BlockPool(blocks) for _ in delays]
        self.live: list[tuple[SequenceCache, list[int]]] = []
        self.delays = delays
        self.contents = [np.full((blocks, SIZE), -1) for _ in delays]
        self.waiting = [np.full((states, max(delay, 1)), -1) for delay in delays]
        self.manager = CacheManager(
            [
                self.group(pool, data, waiting, delay, states)
                for pool, data, waiting, delay in zip(
                    pools, self.contents, self.waiting, delays, strict=True
                )
            ],
            SIZE,
        )

    @staticmethod
    def group(
        pool: BlockPool, data: np.ndarray, waiting: np.ndarray, delay: int, states: int
    ) -> Group:
        def copy_block(source: int, to: int) -> None:
            data[to] = data[source]

        def copy_state(source: int, to: int) -> None:
            waiting[to] = waiting[source]

        def restore(table: np.ndarray, state: int, old: int, new: int) -> None:
            for place in range(new // delay * delay, min(new, old // delay * delay)):
                waiting[state, place % delay] = data[table[place // SIZE], place % SIZE]

        if not delay:
            return Group(pool, copy_block)
        return Group(
            pool,
            copy_block,
            in_blocks=lambda entries: entries // delay * delay,
            delayed=True,
            states=BlockPool(states),
            copy_state=copy_state,
            restore=restore,
        )

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def add(self, tokens: list[int]) -> None:
        cache = self.manager.create()
        hits = self.manager.match_prefix(cache, np.array(tokens))
        assert hits % SIZE == 0
        assert hits < len(tokens)
        self.live.append((cache, tokens[:hits]))
        self.check_contents(cache, tokens[:hits])
        self.extend(len(self.live) - 1, tokens[hits:])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=9))
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        self.extend(data.draw(st.integers(0, len(self.live) - 1)), tokens)

    def extend(self, index: int, tokens: list[int]) -> None:
        cache, known = self.live[index]
        before = [table.ids.tolist() for table in cache.tables]
        possible = self.manager.can_append(cache, len(tokens))
        try:
            self.manager.append(cache, len(tokens))
        except CacheError:
            assert not possible
            assert before == [table.ids.tolist() for table in cache.tables]
            assert cache.num_tokens == len(known)
            return
        assert possible
        every = known + tokens
        for g, (table, storage) in enumerate(zip(cache.tables, self.contents, strict=True)):
            in_blocks = self.manager.groups[g].in_blocks
            waiting, delay = self.waiting[g][cache.states[g]], self.delays[g]
            for place in range(in_blocks(len(known)), in_blocks(len(every))):
                waits = place < len(known) and delay
                token = waiting[place % delay] if waits else every[place]
                storage[table[place // SIZE], place % SIZE] = token
            for place in range(max(len(known), in_blocks(len(every))), len(every)):
                waiting[place % delay] = every[place]
        self.live[index] = (cache, known + tokens)
        self.manager.commit(cache, np.array(known + tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        cache, known = data.draw(st.sampled_from(self.live))
        groups = self.manager.groups
        full = any(
            group.states and not group.states.num_free and state >= 0
            for group, state in zip(groups, cache.states, strict=True)
        )
        if full:
            with pytest.raises(CacheError, match="states"):
                self.manager.fork(cache)
        else:
            self.live.append((self.manager.fork(cache), list(known)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        cache, known = self.live[index]
        keep = data.draw(st.integers(0, len(known)))
        try:
            self.manager.truncate(cache, keep)
        except CacheError:  # the last tokens must wait again, and no state is free
            assert any(g.states and not g.states.num_free for g in self.manager.groups)
            assert any(delay and keep % delay for delay in self.delays)
        else:
            self.live[index] = (cache, known[:keep])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        cache, known = self.live[index]
        self.manager.reset(cache)
        hits = self.manager.match_prefix(cache, np.array(known)) if known else 0
        self.live[index] = (cache, known[:hits])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        cache, _ = self.live.pop(index)
        self.manager.free(cache)
        with pytest.raises(CacheError):
            self.manager.free(cache)

    @rule()
    def drop(self) -> None:
        for group in self.manager.groups:
            group.pool.drop_cached()

    def check_contents(self, cache: SequenceCache, known: list[int]) -> None:
        for g, (table, storage) in enumerate(zip(cache.tables, self.contents, strict=True)):
            stored = self.manager.groups[g].in_blocks(len(known))
            assert storage[table.ids].ravel()[:stored].tolist() == known[:stored]
            for place in range(stored, len(known)):
                assert self.waiting[g][cache.states[g], place % self.delays[g]] == known[place]

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check_integrity()
            for cache, known in self.live:
                assert cache.num_tokens == len(known)
                self.check_contents(cache, known)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for cache, _ in self.live:
                self.manager.free(cache)
            self.manager.check_integrity()
            assert self.manager.used_blocks == 0


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def one_pool(blocks: int = 8, **options: bool) -> CacheManager:
    return CacheManager([Group(BlockPool(blocks), lambda a, b: None)], SIZE, **options)


def filled(manager: CacheManager, tokens: np.ndarray) -> SequenceCache:
    cache = manager.create()
    manager.match_prefix(cache, tokens)
    manager.append(cache, len(tokens) - cache.num_tokens)
    manager.commit(cache, tokens)
    return cache


def test_prefix_survives_its_owner_and_leaves_one_token() -> None:
    manager, tokens = one_pool(), np.arange(8)
    manager.free(filled(manager, tokens))
    assert manager.match_prefix(manager.create(), tokens) == 4  # not 8: one token must be computed
    assert manager.match_prefix(manager.create(), np.arange(9)) == 8
    assert manager.match_prefix(manager.create(), np.arange(1, 9)) == 0


def test_a_failed_lookup_leaves_no_key_behind() -> None:
    manager = one_pool()
    cache = manager.create()
    manager.match_prefix(cache, np.array([1, 2, 3, 4, 5]))
    other = np.array([6, 6, 6, 6, 6])
    manager.append(cache, 5)
    manager.commit(cache, other)
    assert manager.match_prefix(manager.create(), np.array([1, 2, 3, 4, 5])) == 0
    assert manager.match_prefix(manager.create(), other) == SIZE


def test_same_block_after_another_prefix_is_another_block() -> None:
    manager = one_pool()
    manager.free(filled(manager, np.array([1, 1, 1, 1, 2, 2, 2, 2, 3])))
    assert manager.match_prefix(manager.create(), np.array([2, 2, 2, 2, 3])) == 0
    assert chain_key(b"", np.arange(4)) != chain_key(chain_key(b"", np.arange(4)), np.arange(4))


def test_least_recently_released_is_evicted_first() -> None:
    manager = one_pool(4)
    old, new = np.full(5, 7), np.full(5, 8)
    manager.free(filled(manager, old))
    manager.free(filled(manager, new))
    cache = manager.create()
    manager.append(cache, 3 * SIZE)  # 4 blocks: 2 blank, then the oldest cached one
    assert manager.groups[0].pool.evictions == 1
    assert manager.match_prefix(manager.create(), old) == 0
    assert manager.match_prefix(manager.create(), new) == SIZE


def test_fork_copies_only_when_one_side_writes() -> None:
    copies = []
    pool = BlockPool(8)
    manager = CacheManager([Group(pool, lambda a, b: copies.append((a, b)))], SIZE)
    cache = filled(manager, np.arange(6))
    child = manager.fork(cache)
    assert pool.num_used == 2
    manager.append(child, 1)
    assert len(copies) == 1
    assert cache.tables[0][0] == child.tables[0][0]
    assert cache.tables[0][1] != child.tables[0][1]
    manager.append(cache, 1)  # now the only holder: written in place
    assert len(copies) == 1


def test_blocks_that_a_truncation_empties_are_published_anew() -> None:
    """Of 16 tokens with a delay of 8, truncated to 15, the last 7 wait again."""
    data, waiting = np.zeros((8, SIZE), dtype=int), np.zeros((2, 8), dtype=int)
    group = CacheMachine.group(BlockPool(8), data, waiting, 8, 2)
    manager, tokens = CacheManager([group], SIZE), np.arange(16)
    cache = filled(manager, tokens)
    manager.truncate(cache, 15)
    manager.check_integrity()
    assert cache.published == cache.tables[0].count == 2
    other = np.append(tokens[:15], 99)
    manager.append(cache, 1)
    manager.commit(cache, other)
    manager.check_integrity()
    assert manager.match_prefix(manager.create(), np.append(other, 0)) == 16


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = one_pool(prefix_caching=False)
    manager.free(filled(manager, np.arange(9)))
    assert manager.match_prefix(manager.create(), np.arange(9)) == 0


def test_misuse_is_refused() -> None:
    manager = one_pool(2)
    cache = manager.create()
    with pytest.raises(CacheError, match="are free"):
        manager.append(cache, 9)
    with pytest.raises(CacheError, match="truncate"):
        manager.truncate(cache, 1)
    with pytest.raises(CacheError, match="at least one block"):
        BlockPool(0)
    pool = BlockPool(1)
    with pytest.raises(CacheError, match="blank"):
        pool.acquire(0)
    block = pool.allocate()
    with pytest.raises(CacheError, match="in use"):
        pool.allocate()
    pool.release(block)
    with pytest.raises(CacheError, match="more often"):
        pool.release(block)


@pytest.mark.parametrize("damage", ["leak", "double", "lost", "key"])
def test_integrity_check_sees_damage(damage: str) -> None:
    manager = one_pool()
    pool = manager.groups[0].pool
    cache = filled(manager, np.arange(9))
    if damage == "leak":
        pool.acquire(cache.tables[0][0])
    elif damage == "double":
        pool._blank.append(cache.tables[0][0])
    elif damage == "lost":
        pool._blank.pop()
    else:
        pool._key_of[cache.tables[0][2]] = "wrong"
    with pytest.raises(CacheError):
        manager.check_integrity()
