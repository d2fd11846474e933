"""Native block pools and block hashes are the Python ones, only faster: in lock-step over random lives."""

import dataclasses
import random
from array import array

import numpy as np
import pytest

from kvtune.cache import KVCacheManager
from kvtune.cache.block_hashes import BlockHashes, packed
from kvtune.cache.eviction import POLICIES
from kvtune.cache.hashing import chain_hashes, root_hash, token_array
from kvtune.cache.native import cache_library, library_path
from kvtune.cache.native_pool import NativePool
from kvtune.cache.table import Table
from kvtune.errors import HostError, InvariantError
from kvtune.spec import KVGroup, LayerKind, PoolBudget
from kvtune.testing.prefix_index import PrefixIndexSuite
from kvtune.types import BlockHash

pytestmark = pytest.mark.skipif(library_path() is None, reason="the native pools are not built")

SHAPE = {"num_kv_heads": 1, "k_head_dim": 8, "v_head_dim": 8}
FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), **SHAPE)
SLIDING = KVGroup(index=1, kind=LayerKind.SLIDING, layers=(1,), window=5, **SHAPE)
NATIVE_POLICIES = cache_library().policies if library_path() else ()


class TestNativeIndexConforms(PrefixIndexSuite):
    def make_index(self, *, max_evicted):
        self.pool = NativePool(cache_library(), 1 << 14, 0, policy="lru", max_evicted=max_evicted)
        return self.pool.index


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 7, 8, 16, 100])
def test_native_hashes_are_those_of_hashlib(block_size, portable):
    tokens = token_array(np.random.default_rng(block_size).integers(0, 2**31, 9 * block_size + 1))
    root = root_hash(b"recipe", "tenant")
    native = cache_library().hash_chain(root, tokens, block_size, portable=portable)
    assert native == chain_hashes(root, tokens, block_size)


def test_block_hashes_are_a_sequence_whose_slices_share_memory():
    names = [bytes([i]) * 32 for i in range(6)]
    hashes = packed(names)
    assert list(hashes) == names
    assert list(hashes[2:5][1:]) == names[3:5]
    assert hashes[-1] == names[5]
    assert hashes[1:] == tuple(names[1:])
    assert hashes != names[:5]
    own = hashes[4:].copy()
    own.extend(hashes[:1])
    assert own == [*names[4:], names[0]]
    assert hashes == names
    assert isinstance(packed(hashes), BlockHashes)
    with pytest.raises(IndexError):
        hashes[6]


def pair(policy, **kwargs):
    """(Python's, native) managers of the same cache."""
    return [KVCacheManager(policy=policy, native=native, **kwargs) for native in (False, True)]


def state_of(manager):
    tables = {r: [t.tolist() for t in manager.block_tables(r)] for r in manager.request_ids()}
    return manager.usage(), dataclasses.asdict(manager.stats()), tables


def match_of(manager, tokens, salt):
    match = manager.match(tokens, cache_salt=salt)
    facts = (match.num_tokens, [b.tolist() for b in match.blocks], dict(match.misses), match.leader)
    return match, (*facts, match.awaited, list(match.block_hashes))


def both(managers, verb):
    """What both answer; they must answer alike."""
    python, native = (verb(manager) for manager in managers)
    assert python == native
    return python


class LockStep:
    """One random life after the other over two managers."""

    def __init__(self, managers, rng, num_tokens):
        self.managers, self.rng, self.num_tokens = managers, rng, num_tokens
        self.live = {}
        self.prompts = [[]]
        self.count = 0

    def step(self):
        verbs = [self.admit, self.admit, self.grow, self.grow, self.free, self.fork, self.rare]
        if len(self.live) > 3:
            verbs = [self.free]
        self.rng.choice(verbs if self.live else [self.admit])()
        assert state_of(self.managers[0]) == state_of(self.managers[1])

    def admit(self):
        old = self.rng.choice(self.prompts[-30:])
        own = [self.rng.randrange(2) for _ in range(self.rng.randrange(1, self.num_tokens))]
        tokens = [*old[: self.rng.randrange(len(old) + 1)], *own][: 3 * self.num_tokens]
        salt = self.rng.choice(["", "", "", "tenant"])
        self.prompts.append(tokens)
        matches = [match_of(manager, tokens, salt) for manager in self.managers]
        assert matches[0][1] == matches[1][1]
        self.count += 1
        name = f"r{self.count}"
        end = min(len(tokens), matches[0][0].num_tokens + self.rng.randrange(1, self.num_tokens))
        gate, reserve = self.rng.choice([None, len(tokens)]), self.rng.choice([0, 0.2])
        answers = [
            manager.allocate(name, end, match=match, reserve=reserve, gate_tokens=gate) is not None
            for manager, (match, _) in zip(self.managers, matches, strict=True)
        ]
        assert answers[0] == answers[1]
        if answers[0]:
            self.live[name] = (tokens, end)
            self.commit(name, tokens, end)

    def commit(self, name, tokens, end):
        if self.rng.random() < 0.9:  # else the step fails
            both(self.managers, lambda m: m.commit(name, tokens, end))

    def grow(self):
        name = self.rng.choice(sorted(self.live))
        tokens, end = self.live[name]
        tokens = [*tokens, *(self.rng.randrange(2) for _ in range(self.rng.randrange(4)))]
        end = min(len(tokens), end + self.rng.randrange(1, 8))
        others = [r for r in sorted(self.live) if r != name][:2]
        both(self.managers, lambda m: m.has_room(name, end, without=others))
        if both(self.managers, lambda m: m.allocate(name, end)) is not None:
            self.live[name] = (tokens, end)
            self.commit(name, tokens, end)

    def free(self):
        name = self.rng.choice(sorted(self.live))
        del self.live[name]
        both(self.managers, lambda m: m.free(name))

    def fork(self):
        name = self.rng.choice(sorted(self.live))
        self.count += 1
        child = f"r{self.count}"
        both(self.managers, lambda m: m.fork(name, child))
        self.live[child] = self.live[name]

    def rare(self):
        if self.rng.random() < 0.1:
            both(self.managers, lambda m: m.reset_prefix_cache())
        elif self.rng.random() < 0.3:
            hashes = self.managers[0].match(self.rng.choice(self.prompts)).block_hashes
            both(self.managers, lambda m: m.forget(hashes))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["full", "windows", "first"])
@pytest.mark.parametrize("policy", NATIVE_POLICIES)
def test_managers_on_native_and_python_pools_do_the_same(policy, shape, seed):
    groups = [FULL] if shape == "full" else [FULL, SLIDING]
    first = [3] * len(groups) if shape == "first" else None
    num_blocks = [random.Random(seed).choice([9, 17, 40])] * len(groups)
    managers = pair(policy, groups=groups, num_blocks=num_blocks, block_size=2, num_first_blocks=first)
    lives = LockStep(managers, random.Random(seed), num_blocks[0])
    for i in range(900):
        lives.step()
        if i % 10 == 0:
            for manager in managers:
                manager.check()
    stats = managers[0].stats()
    assert stats.evicted_blocks > 20
    assert stats.hit_tokens > 20
    assert stats.duplicate_blocks > 0


@pytest.mark.parametrize("shape", ["full", "windows"])
@pytest.mark.parametrize("policy", NATIVE_POLICIES)
def test_managers_do_the_same_with_tables_of_hundreds_of_blocks(policy, shape):
    groups = [FULL] if shape == "full" else [FULL, SLIDING]
    managers = pair(policy, groups=groups, num_blocks=[900] * len(groups), block_size=1)
    lives = LockStep(managers, random.Random(7), 250)
    for i in range(300):
        lives.step()
        if i % 10 == 0:
            for manager in managers:
                manager.check()
    stats = managers[0].stats()
    assert stats.evicted_blocks > 500
    assert stats.hit_tokens > 500


@pytest.mark.parametrize("policy", NATIVE_POLICIES)
def test_budgets_change_alike(policy):
    managers = pair(policy, groups=[FULL], num_blocks=[12], block_size=2, budgets=[PoolBudget(total=12)])
    rng = random.Random(5)
    lives = LockStep(managers, rng, 8)
    for _ in range(300):
        lives.step()
        total = rng.randrange(6, 13)
        for manager in managers:
            manager.precision.set_budgets([PoolBudget(total=total)])
            manager.precision.shed_idle()
        if managers[0].precision.is_overspent:
            for manager in managers:
                manager.precision.set_budgets([PoolBudget(total=12)])
        both(managers, lambda m: m.precision.free_places(0))
        assert state_of(managers[0]) == state_of(managers[1])


def test_names_of_a_trace_are_found_beside_hashes():
    for manager in pair("lru", groups=[FULL], num_blocks=[8], block_size=2):
        named = (BlockHash(b"named by a trace"),)
        match = manager.match([1, 2, 3, 4, 5], block_hashes=named)
        assert manager.allocate("a", 5, match=match) is not None
        manager.commit("a", [1, 2, 3, 4, 5], 5)
        assert manager.match([9, 9, 3, 4, 5], block_hashes=named).num_tokens == 4
        assert manager.match([1, 2, 3, 4, 5]).num_tokens == 0
        manager.check()


def test_misuse_is_an_invariant_error_from_native_code_too():
    manager = KVCacheManager([FULL], [4], block_size=2, policy="lru", native=True)
    pool = manager._groups[0].pool
    with pytest.raises(InvariantError, match="block 2 was given back more often than taken"):
        pool.decref(Table("i", [2]))
    with pytest.raises(InvariantError, match="block 1 is free and cannot be shared"):
        pool.incref(Table("i", [1]))
    with pytest.raises(InvariantError, match="no block is free or idle"):
        pool.take(5)


def test_what_cannot_be_native_is_refused_by_name():
    factory = POLICIES["fifo"]
    for policy in ("fifo", factory):
        assert not isinstance(
            KVCacheManager([FULL], [4], block_size=2, policy=policy)._groups[0].pool, NativePool
        )
        with pytest.raises(HostError, match="do not serve policy"):
            KVCacheManager([FULL], [4], block_size=2, policy=policy, native=True)


def test_a_pool_of_ten_million_blocks_takes_memory_as_it_fills():
    pool = NativePool(cache_library(), 10_000_000, 0, policy="lru", max_evicted=40_000_000)
    assert pool.counts().bytes <= 100 * 10_000_000
    ids = pool.take(65_536)
    hashes = BlockHashes(array("B", np.random.default_rng(0).bytes(32 * 65_536)))
    pool.publish(ids, hashes, 0, len(ids))
    assert pool.find_run(hashes) == ids
    pool.decref(ids[::-1])
    assert pool.usage().idle == 65_536


def _home(name, num_slots):
    """Where csrc/pool/digest.h puts a name of 32 bytes."""
    top = (1 << 64) - 1
    words = np.frombuffer(name, dtype="<u8").tolist()
    salts = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xFF51AFD7ED558CCD)
    a, b, c, d = (w ^ s for w, s in zip(words, salts, strict=True))
    mixed = sum((product & top) ^ product >> 64 for product in (a * b, c * d)) & top
    return mixed * num_slots >> 64


def test_names_that_all_want_the_same_places_are_found_kept_apart_and_forgotten():
    num_blocks = 60
    num_slots = num_blocks * 3 // 2 + 16
    rng = np.random.default_rng(5)
    names = [n for n in (rng.bytes(32) for _ in range(12_000)) if _home(n, num_slots) in (0, num_slots - 2)]
    assert len(names) > 120  # runs of dozens, over the end of the table
    pool = NativePool(cache_library(), num_blocks, 0, policy="lru", max_evicted=10)
    index = pool.index
    held = {}
    for step in range(4000):
        name = names[int(rng.integers(120))]
        if name in held:
            (index.evict if step % 2 else index.forget)(name)
            del held[name]
        elif len(held) < num_blocks:
            free = min(set(range(num_blocks)) - set(held.values()))
            index.insert(name, free)
            held[name] = free
        if step % 50 == 0:
            assert {n: index.find(n) for n in names} == {n: held.get(n) for n in names}
            assert dict(index.items()) == held
