"""KVCacheManager, one behaviour at a time, block ids written out."""

import hashlib

import numpy as np
import pytest

from kvtune.cache import KVCacheManager
from kvtune.cache.hashing import ChainMemo, chain_hashes, root_hash, token_array
from kvtune.cache.table import Table
from kvtune.errors import InvariantError, UsageError
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import BlockCopy, BlockHash, MissCause

pytestmark = pytest.mark.usefixtures("pools")

SHAPE = {"num_kv_heads": 1, "k_head_dim": 8, "v_head_dim": 8}
FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), **SHAPE)
SLIDING = KVGroup(index=1, kind=LayerKind.SLIDING, layers=(1,), window=4, **SHAPE)


def manager_of(blocks=8, groups=(FULL,), **kwargs):
    return KVCacheManager(groups, [blocks] * len(groups), block_size=2, **kwargs)


def run(manager, request_id, tokens, **kwargs):
    """Admit a request and compute all of its tokens; returns its match."""
    match = manager.match(tokens, **kwargs)
    assert manager.allocate(request_id, len(tokens), match=match) is not None
    manager.commit(request_id, tokens, len(tokens))
    return match


def tables(manager, request_id):
    return [table.tolist() for table in manager.block_tables(request_id)]


def test_hashes_are_a_sha256_chain_over_salt_and_little_endian_tokens():
    match = manager_of(fingerprint=b"recipe").match([1, 2, 3, 4, 5], cache_salt="t")
    root = hashlib.sha256(b"recipe" + b"t").digest()
    first = hashlib.sha256(root + np.array([1, 2], "<i4").tobytes()).digest()
    second = hashlib.sha256(first + np.array([3, 4], "<i4").tobytes()).digest()
    assert match.root == root
    assert match.block_hashes == (first, second)


def test_a_second_request_shares_the_full_blocks_of_the_first():
    manager = manager_of()
    run(manager, "a", [1, 2, 3, 4, 5])
    match = run(manager, "b", [1, 2, 3, 4, 9])
    assert match.num_tokens == 4
    assert match.misses == {MissCause.PARTIAL_BLOCK: 1}
    assert tables(manager, "a") == [[0, 1, 2]]
    assert tables(manager, "b") == [[0, 1, 3]]


def test_the_last_token_is_always_left_to_compute():
    manager = manager_of()
    run(manager, "a", [1, 2, 3, 4])
    match = manager.match([1, 2, 3, 4])
    assert match.num_tokens == 2
    assert match.misses == {MissCause.LAST_TOKEN: 2}


def test_only_full_and_computed_blocks_are_found():
    manager = manager_of()
    tokens = [1, 2, 3, 4, 5, 6]
    manager.allocate("a", 6, match=manager.match(tokens))
    assert manager.match([*tokens, 7]).num_tokens == 0
    manager.commit("a", tokens, 3)
    assert manager.match([*tokens, 7]).num_tokens == 2


def test_salts_never_share():
    manager = manager_of()
    run(manager, "a", [1, 2, 3], cache_salt="x")
    assert manager.match([1, 2, 3], cache_salt="y").misses == {
        MissCause.NEVER_SEEN: 2,
        MissCause.PARTIAL_BLOCK: 1,
    }
    assert manager.match([1, 2, 3], cache_salt="x").num_tokens == 2


def test_evicted_and_never_seen_are_told_apart():
    manager = manager_of(blocks=2)
    run(manager, "a", [1, 2, 3])
    manager.free("a")
    run(manager, "b", [7, 7, 7, 7])
    manager.free("b")
    assert manager.match([1, 2, 3, 4, 5]).misses == {
        MissCause.EVICTED: 2,
        MissCause.NEVER_SEEN: 2,
        MissCause.PARTIAL_BLOCK: 1,
    }


def test_memory_of_evictions_is_bounded_by_four_pools():
    manager = manager_of(blocks=1)
    for token in range(6):
        run(manager, "r", [token, token])
        manager.free("r")
    causes = [set(manager.match([token, token, 0]).misses) for token in range(5)]
    assert [MissCause.EVICTED in c for c in causes] == [False, True, True, True, True]


def test_tail_blocks_of_a_freed_request_are_evicted_before_its_head():
    manager = manager_of(blocks=3)
    run(manager, "a", [1, 2, 3, 4, 5, 6])
    manager.free("a")
    run(manager, "b", [9, 9])
    assert manager.match([1, 2, 3, 4, 5, 6, 7]).num_tokens == 4


def test_fifo_evicts_the_head_first():
    manager = manager_of(blocks=3, policy="fifo")
    run(manager, "a", [1, 2, 3, 4, 5, 6])
    manager.free("a")
    run(manager, "b", [9, 9])
    match = manager.match([1, 2, 3, 4, 5, 6, 7])
    assert match.misses == {MissCause.EVICTED: 6, MissCause.PARTIAL_BLOCK: 1}


def test_the_first_copy_of_a_block_computed_twice_stays_and_the_second_is_given_back():
    manager = manager_of()
    match = manager.match([1, 2, 3])
    manager.allocate("a", 3, match=match)
    manager.allocate("b", 3, match=match)
    manager.commit("a", [1, 2, 3], 3)
    manager.commit("b", [1, 2, 3], 3)
    assert tables(manager, "a") == [[0, 1]]
    assert tables(manager, "b") == [[0, 3]]
    assert manager.stats().duplicate_blocks == 1
    assert manager.usage()[0].free == 5
    manager.check()


def test_a_block_that_left_the_window_goes_idle_and_an_unpublished_one_free():
    for caching, idle in ((True, 2), (False, 0)):
        manager = manager_of(groups=(FULL, SLIDING), enable_prefix_caching=caching)
        run(manager, "a", [1, 2, 3, 4, 5, 6, 7, 8])
        assert tables(manager, "a") == [[0, 1, 2, 3], [-1, -1, 2, 3]]
        full, sliding = manager.usage()
        assert (full.referenced, sliding.referenced, sliding.idle) == (4, 2, idle)


def test_a_hit_needs_only_the_blocks_a_sliding_window_still_sees():
    manager = KVCacheManager((FULL, SLIDING), [8, 3], block_size=2)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    manager.allocate("a", 2, match=manager.match(tokens))
    for end in range(2, 9):
        assert manager.allocate("a", end) is not None
        manager.commit("a", tokens, end)
    match = manager.match([*tokens, 9])
    assert match.num_tokens == 8
    assert match.blocks[1][:2].tolist() == [-1, -1]
    short = manager.match([1, 2, 3])
    assert (short.num_tokens, short.misses) == (0, {MissCause.WINDOW: 2, MissCause.PARTIAL_BLOCK: 1})


def test_a_fork_shares_blocks_and_the_first_to_write_copies():
    manager = manager_of()
    run(manager, "a", [1, 2, 3])
    manager.fork("a", "b")
    assert tables(manager, "b") == [[0, 1]]
    allocation = manager.allocate("b", 4)
    assert allocation.copies == (BlockCopy(group=0, src=1, dst=2),)
    assert tables(manager, "b") == [[0, 2]]
    assert manager.allocate("a", 4).copies == ()
    assert manager.stats().copied_blocks == 1


def test_a_fork_does_not_share_slots_that_are_not_computed():
    manager = manager_of()
    manager.allocate("a", 8, match=manager.match([1, 2, 3]))
    manager.commit("a", [1, 2, 3], 3)
    manager.fork("a", "b")
    assert [len(t) for t in tables(manager, "b")] == [2]


def test_writing_a_shared_block_into_slots_from_before_the_fork_is_refused():
    manager = manager_of()
    manager.allocate("a", 8, match=manager.match([1, 2, 3]))
    manager.commit("a", [1, 2, 3], 3)
    manager.fork("a", "b")
    with pytest.raises(InvariantError, match="allocate after a fork"):
        manager.commit("a", [1, 2, 3, 4], 4)
    assert len(manager.allocate("a", 4).copies) == 1
    manager.commit("a", [1, 2, 3, 4], 4)


def test_first_blocks_come_from_ids_of_their_own():
    manager = manager_of(blocks=4, num_first_blocks=[2])
    run(manager, "a", [1, 2, 3, 4, 5])
    run(manager, "b", [6, 6])
    assert tables(manager, "a") == [[4, 0, 1]]
    assert tables(manager, "b") == [[5]]
    assert manager.allocate("c", 1, match=manager.match([8])) is None
    usage = manager.usage()[0]
    assert (usage.body.referenced, usage.first.referenced) == (2, 2)


def test_without_room_nothing_changes():
    manager = manager_of(blocks=2)
    run(manager, "a", [1, 2, 3])
    before = (manager.usage(), manager.stats())
    assert manager.allocate("b", 2, match=manager.match([9, 9])) is None
    assert manager.allocate("a", 5) is None
    assert (manager.usage(), manager.stats()) == before
    manager.check()


def test_matched_idle_blocks_do_not_count_as_room():
    manager = manager_of(blocks=2)
    run(manager, "a", [1, 2, 3, 4])
    manager.free("a")
    assert manager.allocate("b", 6, match=manager.match([1, 2, 3, 4, 5, 6])) is None
    assert manager.allocate("b", 4, match=manager.match([1, 2, 3, 4])) is not None


def test_reserve_keeps_a_share_available():
    manager = manager_of(blocks=8)
    assert manager.allocate("a", 14, match=manager.match([1] * 14), reserve=0.25) is None
    assert manager.allocate("a", 12, match=manager.match([1] * 12), reserve=0.25) is not None


def test_the_gate_tests_the_whole_prompt_and_what_was_promised_to_others():
    manager = manager_of(blocks=8)
    first, second = [1] * 10, [2] * 8
    assert manager.allocate("a", 2, match=manager.match(first), gate_tokens=10) is not None
    assert manager.allocate("b", 2, match=manager.match(second), gate_tokens=8) is None
    assert manager.allocate("b", 2, match=manager.match(second), gate_tokens=6) is not None
    manager.check()
    manager.free("a")
    assert manager.allocate("c", 2, match=manager.match([3] * 10), gate_tokens=10) is not None


def test_the_request_that_computes_a_prefix_is_its_leader_until_it_is_done_or_gone():
    manager = manager_of()
    tokens = [1, 2, 3, 4, 5]
    manager.allocate("a", 2, match=manager.match(tokens))
    follower = manager.match([1, 2, 3, 4, 9])
    assert follower.leader == "a"
    assert manager.leader_of(follower.awaited) == "a"
    manager.commit("a", tokens, 2)
    assert manager.match([1, 2, 9]).leader is None
    assert manager.match([1, 2, 3, 4, 9]).leader == "a"
    manager.free("a")
    assert manager.match([1, 2, 3, 4, 9]).leader is None


def test_nobody_waits_for_a_block_that_would_be_computed_anyway():
    manager = manager_of()
    manager.allocate("a", 2, match=manager.match([1, 2]))
    assert manager.match([1, 2]).leader is None


def test_reset_forgets_everything_and_running_requests_publish_nothing_more():
    manager = manager_of()
    run(manager, "a", [1, 2, 3])
    run(manager, "b", [7, 7, 7])
    manager.free("b")
    manager.reset_prefix_cache()
    manager.allocate("a", 4)
    manager.commit("a", [1, 2, 3, 4], 4)
    assert manager.match([1, 2, 3, 4, 5]).misses[MissCause.NEVER_SEEN] == 4
    manager.free("a")
    assert manager.usage()[0].free == 8
    manager.check()


def test_forgotten_blocks_are_free_again_and_were_never_seen():
    manager = manager_of(groups=(FULL, SLIDING))
    tokens = [1, 2, 3, 4, 5, 6, 7]
    run(manager, "a", tokens, cache_salt="x")
    run(manager, "b", tokens, cache_salt="y")
    hashes = manager.match(tokens, cache_salt="x").block_hashes
    manager.free("a")
    manager.free("b")
    assert [usage.idle for usage in manager.usage()] == [6, 6]
    manager.forget(hashes)
    assert [usage.idle for usage in manager.usage()] == [3, 3]
    assert [usage.free for usage in manager.usage()] == [5, 5]
    assert manager.stats().evicted_blocks == 0
    forgotten = {MissCause.NEVER_SEEN: 6, MissCause.PARTIAL_BLOCK: 1}
    assert manager.match(tokens, cache_salt="x").misses == forgotten
    assert manager.match(tokens, cache_salt="y").num_tokens == 6
    manager.forget(hashes)  # nothing left to forget
    run(manager, "c", tokens, cache_salt="x")
    manager.check()


def test_a_block_somebody_holds_is_not_forgotten():
    manager = manager_of(num_first_blocks=[4])
    match = run(manager, "a", [1, 2, 3, 4, 5])
    manager.forget(match.block_hashes)
    assert run(manager, "b", [1, 2, 3, 4, 9]).num_tokens == 4
    manager.free("a")
    manager.free("b")
    manager.forget(match.block_hashes)
    assert [(u.first.idle, u.body.idle) for u in manager.usage()] == [(0, 0)]
    manager.check()


def test_caching_off_shares_nothing_and_says_so():
    manager = manager_of(enable_prefix_caching=False)
    run(manager, "a", [1, 2, 3])
    assert manager.match([1, 2, 3]).misses == {MissCause.DISABLED: 3}
    manager.free("a")
    assert manager.usage()[0].free == 8


def test_fits_knows_windows_and_first_blocks():
    assert manager_of(blocks=4).fits(8)
    assert not manager_of(blocks=4).fits(9)
    sliding = KVCacheManager([SLIDING], [3], block_size=2)
    assert sliding.fits(1000)
    assert not KVCacheManager([SLIDING], [2], block_size=2).fits(1000)
    assert manager_of(blocks=4, num_first_blocks=[1]).fits(10)
    assert not manager_of(blocks=4, num_first_blocks=[1]).fits(11)


def test_misses_of_an_admission_are_counted():
    manager = manager_of()
    run(manager, "a", [1, 2, 3])
    run(manager, "b", [1, 2, 9])
    stats = manager.stats()
    assert (stats.queried_tokens, stats.hit_tokens) == (6, 2)
    assert stats.misses == {MissCause.NEVER_SEEN: 2, MissCause.PARTIAL_BLOCK: 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.commit("x", [1], 1), "holds no blocks"),
        (lambda m: m.free("x"), "holds no blocks"),
        (lambda m: m.allocate("a", 4, match=m.match([1])), "holds blocks already"),
        (lambda m: m.commit("a", [1, 2, 3, 4, 5, 6], 6), "cannot commit 6 tokens"),
        (lambda m: m.commit("a", [1, 2, 3], 2), "cannot commit 2 tokens after 3"),
        (lambda m: m.fork("a", "a"), "exists already"),
    ],
)
def test_misuse_is_an_invariant_error(call, message):
    manager = manager_of()
    run(manager, "a", [1, 2, 3])
    with pytest.raises(InvariantError, match=message):
        call(manager)


def test_more_block_hashes_than_full_blocks_are_refused():
    manager = manager_of()
    match = manager.match([1, 2, 3, 4])
    with pytest.raises(InvariantError, match="2 block hashes do not belong to 3 tokens"):
        manager.match([1, 2, 3], block_hashes=match.block_hashes)


def test_hashes_of_leading_blocks_are_continued_with_the_tokens_behind_them():
    manager = manager_of()
    tokens = [1, 2, 3, 4, 5, 6]
    known = manager.match(tokens[:3]).block_hashes
    assert manager.match(tokens, block_hashes=known) == manager.match(tokens)
    named = (BlockHash(b"named by a trace"),)
    behind = manager.match(tokens, block_hashes=named).block_hashes
    assert behind == (*named, *chain_hashes(named[0], token_array(tokens[2:]), 2))


def test_a_stale_match_is_refused():
    manager = manager_of(blocks=2)
    run(manager, "a", [1, 2, 3])
    manager.free("a")
    match = manager.match([1, 2, 5])
    run(manager, "b", [7, 7, 7, 7])
    manager.free("b")
    with pytest.raises(InvariantError, match="match again"):
        manager.allocate("c", 3, match=match)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_blocks": [0], "block_size": 2}, "at least one block"),
        ({"num_blocks": [4], "block_size": 0}, "at least 1 token"),
        ({"num_blocks": [4, 4], "block_size": 2}, "as many pool sizes"),
        ({"num_blocks": [4], "block_size": 2, "policy": "mru"}, "unknown eviction policy 'mru'"),
    ],
)
def test_impossible_sizes_are_usage_errors(kwargs, message):
    with pytest.raises(UsageError, match=message):
        KVCacheManager([FULL], **kwargs)


def test_token_ids_beyond_32_bits_are_a_usage_error():
    with pytest.raises(UsageError, match="below 2\\^31"):
        manager_of().match([1, 2**31])


@pytest.mark.parametrize("damage", ["ref_count", "hash", "table", "promise"])
def test_check_notices_damage(damage):
    manager = manager_of()
    run(manager, "a", [1, 2, 3])
    group, holding = manager._groups[0], manager._holdings["a"]
    if damage == "ref_count":
        group.pool.decref(Table("i", [0]))
    elif damage == "hash":
        group.index.evict(group.pool.hash_of(0))
    elif damage == "table":
        holding.tables[0][1] = 0
    else:
        group.promised += 1
    with pytest.raises(InvariantError):
        manager.check()


def test_a_memo_of_chains_tells_what_hashing_tells():
    rng = np.random.default_rng(3)
    memo, size = ChainMemo(4, num_segments=8), 4
    prompts = [rng.integers(0, 2**31 - 1, int(n)).astype("<i4") for n in rng.integers(0, 900, 6)]
    roots = [root_hash(b"recipe", salt) for salt in ("", "tenant")]
    for _ in range(300):
        old = prompts[int(rng.integers(len(prompts)))]
        tokens = np.concatenate(
            [old[: int(rng.integers(len(old) + 1))], rng.integers(0, 9, int(rng.integers(200)))]
        )
        tokens = token_array(tokens)
        root = roots[int(rng.integers(2))]
        assert memo.chain(root, tokens) == chain_hashes(root, tokens, size)
    assert 0 < memo.num_segments <= 8


def test_a_memo_keeps_what_was_hashed_twice():
    tokens = token_array(range(64 * 4))
    memo = ChainMemo(4)
    for expected in (0, 4, 4):
        memo.chain(root_hash(b"", ""), tokens)
        assert memo.num_segments == expected
