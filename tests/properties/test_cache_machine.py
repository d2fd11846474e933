"""Random lives of requests over manager, pool and index, against a memory that knows what it holds.

Two tokens of vocabulary, block size 2, 8 blocks, one full and one sliding group: collisions of
prefixes, evictions and copies happen all the time.
"""

import copy

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtune.cache import KVCacheManager
from kvtune.spec import KVGroup, LayerKind
from kvtune.testing.memory import PrefixMemory
from kvtune.types import MissCause

BLOCK, BLOCKS, WINDOW = 2, 8, 5
FULL, SLIDING = 0, 1
GROUPS = [
    KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8),
    KVGroup(
        index=1,
        kind=LayerKind.SLIDING,
        layers=(1,),
        num_kv_heads=1,
        k_head_dim=8,
        v_head_dim=8,
        window=WINDOW,
    ),
]
FAMILIES = ([0] * 11, [0, 1] * 6, [1] * 5 + [0] * 6)  # shared prefixes, so that hits are common
TOKENS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=11),
    st.builds(lambda f, n: f[:n], st.sampled_from(FAMILIES), st.integers(4, 11)),
    st.builds(lambda f, n, t: [*f[:n], t], st.sampled_from(FAMILIES), st.integers(1, 10), st.integers(0, 1)),
)
SALTS = st.sampled_from(["", "", "tenant"])


class Life:
    def __init__(self, tokens, salt, computed):
        self.tokens, self.salt, self.computed = list(tokens), salt, computed


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(["lru", "fifo", "gdsf", "hazard", "guarded"]),
        first=st.sampled_from([0, 0, 3]),
        native=st.sampled_from([False, None]),
    )
    def build(self, policy, first, native):
        self.policy, self.first = policy, first
        self.manager = KVCacheManager(
            GROUPS,
            [BLOCKS] * 2,
            block_size=BLOCK,
            policy=policy,
            num_first_blocks=[first, first],
            native=native,
        )
        self.memory = PrefixMemory([None, WINDOW], BLOCK)
        self.lives = {}
        self.count = 0
        self.contents = {}  # (group, block) -> (hash, slots) of published blocks

    def new_id(self):
        self.count += 1
        return f"r{self.count}"

    def compute(self, request_id, life, end):
        tables = self.manager.block_tables(request_id)
        self.memory.write(tables, life.tokens, life.computed, end, salt=life.salt)
        life.computed = end
        self.manager.commit(request_id, life.tokens, end)

    def published(self, g):
        """(salt, prefix) -> block of every published block, read from the memory."""
        pool = self.manager._groups[g].pool
        ids = [b for b in range(BLOCKS + self.first) if pool.hash_of(b) is not None]
        return {self.memory.block(g, b)[-1]: b for b in ids}

    def best_boundary(self, tokens, salt):
        """Brute force: the longest boundary valid in both groups."""
        full, sliding = self.published(FULL), self.published(SLIDING)
        for k in range((len(tokens) - 1) // BLOCK, 0, -1):
            prefixes = [(salt, tuple(tokens[: (i + 1) * BLOCK])) for i in range(k)]
            low = max(0, k * BLOCK - WINDOW + 1) // BLOCK
            if all(p in full for p in prefixes) and all(p in sliding for p in prefixes[low:]):
                return k * BLOCK
        return 0

    @rule(
        tokens=TOKENS,
        salt=SALTS,
        chunk=st.integers(1, 11),
        reserve=st.sampled_from([0, 0.3]),
        gate=st.booleans(),
    )
    def admit(self, tokens, salt, chunk, reserve, gate):
        before = (self.manager.usage(), self.manager.stats())
        match = self.manager.match(tokens, cache_salt=salt)
        assert match == self.manager.match(tokens, cache_salt=salt, block_hashes=match.block_hashes)
        assert match.num_tokens == self.best_boundary(tokens, salt)
        assert match.num_tokens + sum(match.misses.values()) == len(tokens)
        assert match.num_tokens < len(tokens)
        if match.leader is not None:
            assert self.lives[match.leader].computed < match.num_tokens + BLOCK
        request_id = self.new_id()
        end = min(len(tokens), match.num_tokens + chunk)
        allocation = self.manager.allocate(
            request_id, end, match=match, reserve=reserve, gate_tokens=len(tokens) if gate else None
        )
        if allocation is None:
            assert (self.manager.usage(), self.manager.stats()) == before
            if not self.lives and not reserve and not gate:
                assert not self.manager.fits(end) or chunk > 1
            return
        for then, now in zip(before[0], self.manager.usage(), strict=True):
            for pool_then, pool_now in ((then.body, now.body), (then.first, now.first)):
                kept = pool_now.available >= int(reserve * pool_now.total)
                assert kept or pool_now.available == pool_then.available
        life = self.lives[request_id] = Life(tokens, salt, match.num_tokens)
        tables = self.manager.block_tables(request_id)
        self.memory.verify(tables, tokens, match.num_tokens, salt=salt)
        self.compute(request_id, life, end)

    @precondition(lambda self: self.lives)
    @rule(
        data=st.data(),
        more=st.lists(st.integers(0, 1), max_size=4),
        is_lost=st.sampled_from([False, False, True]),
    )
    def step(self, data, more, is_lost):
        request_id = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives[request_id]
        pending = life.tokens[life.computed :] + more
        end = life.computed + data.draw(st.integers(min(1, len(pending)), len(pending)))
        before = (self.manager.usage(), [t.tolist() for t in self.manager.block_tables(request_id)])
        room = self.manager.has_room(request_id, end)
        allocation = self.manager.allocate(request_id, end)
        assert (allocation is not None) == room
        if allocation is None:
            after = (self.manager.usage(), [t.tolist() for t in self.manager.block_tables(request_id)])
            assert after == before
            return
        self.memory.copy(allocation.copies)
        if not is_lost:  # else the step fails and is tried again later
            life.tokens += more
            self.compute(request_id, life, end)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), tail=st.lists(st.integers(0, 1), max_size=2))
    def fork(self, data, tail):
        parent_id = data.draw(st.sampled_from(sorted(self.lives)))
        parent, child_id = self.lives[parent_id], self.new_id()
        self.manager.fork(parent_id, child_id)
        child = copy.deepcopy(parent)
        # Only tokens after the prompt differ: what was hashed ahead of computing stays the same.
        child.tokens += tail
        self.lives[child_id] = child

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def free(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.lives)))
        self.manager.free(request_id)
        del self.lives[request_id]

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def preempt_enough_for_another(self, data):
        """has_room(without=...) predicts exactly or cautiously what freeing will give."""
        request_id = data.draw(st.sampled_from(sorted(self.lives)))
        others = data.draw(st.lists(st.sampled_from(sorted(self.lives)), unique=True, max_size=3))
        others = [o for o in others if o != request_id]
        end = self.lives[request_id].computed + 3
        expected = self.manager.has_room(request_id, end, without=others)
        for other in others:
            self.manager.free(other)
            del self.lives[other]
        if expected:
            allocation = self.manager.allocate(request_id, end)
            assert allocation is not None
            self.memory.copy(allocation.copies)

    @precondition(lambda self: self.count % 8 == 3)
    @rule()
    def forget_all(self):
        self.count += 1
        evicted = self.manager.stats().evicted_blocks
        self.manager.forget({h for group in self.manager._groups for h, _ in group.index.items()})
        assert all(usage.idle == 0 for usage in self.manager.usage())
        assert self.manager.stats().evicted_blocks == evicted

    @precondition(lambda self: self.count % 8 == 7)
    @rule()
    def reset(self):
        self.count += 1
        self.manager.reset_prefix_cache()
        assert self.manager.match([0, 1, 0, 1, 0]).num_tokens == 0
        assert all(usage.idle == 0 for usage in self.manager.usage())

    @invariant()
    def holds(self):
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for request_id, life in self.lives.items():
            tables = self.manager.block_tables(request_id)
            self.memory.verify(tables, life.tokens, life.computed, salt=life.salt)
            if self.first:
                for table in tables:
                    assert all(b >= BLOCKS for b in table[:1] if b >= 0)
                    assert (table[1:] < BLOCKS).all()
        self.published_blocks_never_change()
        if self.policy == "lru" and not self.first:
            self.residents_of_the_full_group_are_closed_under_prefixes()

    def published_blocks_never_change(self):
        now = {}
        for g, group in enumerate(self.manager._groups):
            for block in range(BLOCKS + self.first):
                block_hash = group.pool.hash_of(block)
                if block_hash is not None:
                    now[g, block] = (block_hash, self.memory.block(g, block))
        for key, (block_hash, slots) in now.items():
            assert None not in slots
            old_hash, old_slots = self.contents.get(key, (None, None))
            assert old_hash != block_hash or old_slots == slots
        self.contents = now

    def residents_of_the_full_group_are_closed_under_prefixes(self):
        resident = self.published(FULL)
        for salt, prefix in resident:
            assert len(prefix) == BLOCK or (salt, prefix[:-BLOCK]) in resident


CacheMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_a_long_random_life_of_the_smallest_cache_meets_every_miss_cause():
    rng = np.random.default_rng(3)
    manager = KVCacheManager(GROUPS, [BLOCKS, 4], block_size=BLOCK)
    causes, hits = set(), 0
    for i in range(3000):
        tokens = rng.integers(0, 2, rng.integers(1, 12)).tolist()
        match = manager.match(tokens)
        causes |= set(match.misses)
        hits += match.num_tokens
        end = match.num_tokens
        while end < len(tokens):
            end += 1
            assert (
                manager.allocate(f"r{i}", end, match=match if end == match.num_tokens + 1 else None)
                is not None
            )
            manager.commit(f"r{i}", tokens, end)
        manager.free(f"r{i}")
        manager.check()
    assert hits > 1000
    assert causes == set(MissCause) - {MissCause.DISABLED, MissCause.PREEMPTED, MissCause.LOWERED}
