"""`full_blocks_only` replay is KVCacheManager serving one request after the other, eviction by eviction."""

import functools
import random

import numpy as np
import pytest
import replay_models as textbook
from test_replay_core import CORES, steps_of

from kvtune.cache import KVCacheManager
from kvtune.cache.replay import Replayer
from kvtune.cache.replay_python import PYTHON_POLICIES
from kvtune.errors import UsageError
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import RequestId
from kvtune.workload import Workload, WorkloadRequest, block_trace

BLOCK = 4
GROUP = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)


@functools.cache
def case(seed, num_references):
    """(prompts, their BlockTrace)"""
    prompts = random_prompts(seed, num_references)
    return prompts, trace_of_tokens(prompts)


def random_prompts(seed, num_references):
    """Token ids of prompts that branch, return and end anywhere: on a block's end, within one, at nothing."""
    rng = random.Random(seed)
    prompts = []
    while num_references > 0:
        if prompts and rng.random() < 0.7:
            old = rng.choice(prompts[-200:])
            prompt = old[: rng.randrange(len(old) + 1)]
        else:
            prompt = []
        prompt = [*prompt, *(rng.randrange(50_000) for _ in range(rng.choice([0, 0, 1, 3, 4, 8, 17, 40])))][
            :160
        ]
        if prompt:
            prompts.append(prompt)
            num_references -= -(-len(prompt) // BLOCK)
    return prompts


def trace_of_tokens(prompts):
    requests = tuple(
        WorkloadRequest(request_id=str(i), arrival_s=float(i), token_ids=tuple(prompt))
        for i, prompt in enumerate(prompts)
    )
    return block_trace(Workload(requests=requests, format="test"), BLOCK)


class Witness:
    """Notes what the manager's policy is told to evict, by content."""

    def __init__(self, policy, gone):
        self._policy, self._gone, self._contents = policy, gone, {}

    def insert(self, block_id, *, depth, content=None, parent=None):
        self._contents[block_id] = content
        self._policy.insert(block_id, depth=depth, content=content, parent=parent)

    def remove(self, block_id):
        self._gone.append(self._contents.pop(block_id))
        self._policy.remove(block_id)

    def __len__(self):
        return len(self._policy)

    def __getattr__(self, name):
        return getattr(self._policy, name)


@functools.cache
def serve_all(policy, capacity, seed, num_references):
    """Per request (blocks hit, blocks that left) of the real manager; None for one that can never fit."""
    prompts, trace = case(seed, num_references)
    gone, number = [], {}
    factory = PYTHON_POLICIES[policy].make
    manager = KVCacheManager(
        [GROUP], [capacity], block_size=BLOCK, policy=lambda size: Witness(factory(size), gone)
    )
    steps = []
    for i, prompt in enumerate(prompts):
        if not manager.fits(len(prompt)):
            steps.append(None)
            continue
        request_id, tokens = RequestId(str(i)), np.asarray(prompt, dtype=np.int32)
        match = manager.match(tokens)
        ids = trace.block_ids[trace.request_start[i] : trace.request_start[i + 1]].tolist()
        number.update(zip(match.block_hashes, ids, strict=False))
        assert manager.allocate(request_id, len(prompt), match=match) is not None
        manager.commit(request_id, tokens, len(prompt))
        manager.free(request_id)
        steps.append((match.num_tokens // BLOCK, [number[content] for content in gone]))
        gone.clear()
    manager.check()
    return steps


def replay_all(trace, capacity, policy, core):
    result = Replayer(trace, full_blocks_only=True, core=core).replay(policy, capacity, keep_log=True)
    rejected = result.outcome.is_rejected.tolist()
    return [None if no else step for no, step in zip(rejected, steps_of(result), strict=True)]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("policy", PYTHON_POLICIES)
def test_replay_and_manager_agree_on_every_hit_and_eviction_of_100_000_references(policy, core):
    _, trace = case(1, 100_000)
    assert trace.num_references >= 100_000
    assert replay_all(trace, 3000, policy, core) == serve_all(policy, 3000, 1, 100_000)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("policy", PYTHON_POLICIES)
@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 39, 40, 41])
def test_replay_and_manager_agree_where_a_request_hardly_fits(policy, capacity, core):
    """The last block of a prompt that ends with it is computed again, in a block of its own; a partial one
    takes room; requests longer than the cache are refused."""
    prompts, trace = case(capacity, 3000)
    steps = serve_all(policy, capacity, capacity, 3000)
    assert replay_all(trace, capacity, policy, core) == steps
    assert any(len(prompt) % BLOCK == 0 for prompt in prompts)
    if capacity < 20:
        assert None in steps


def test_full_blocks_alone_are_counted_and_all_tokens():
    trace = trace_of_tokens([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4]])
    result = Replayer(trace, full_blocks_only=True).replay("lru", 10)
    assert (result.blocks_total, result.blocks_hit) == (3, 1)  # the third must compute its last token
    assert (result.tokens_total, result.tokens_hit) == (14, 4)


def test_an_engine_is_not_replayed_on_chunks_of_uneven_size():
    requests = tuple(
        WorkloadRequest(request_id=str(i), hash_ids=(1, 2, 3), hash_lengths=(4, 7, 4), input_length=15)
        for i in range(2)
    )
    trace = block_trace(Workload(requests=requests, format="test"))
    assert Replayer(trace).replay("lru", 9).blocks_hit == 3
    with pytest.raises(UsageError, match="give --block-size"):
        Replayer(trace, full_blocks_only=True)


def test_the_curve_of_all_capacities_is_refused_for_engine_rules():
    trace, _ = textbook.trace_of([["a"]])
    with pytest.raises(UsageError, match="not for full blocks only"):
        Replayer(trace, full_blocks_only=True).lru_curve()
