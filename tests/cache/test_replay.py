"""The policies replay traces by the published semantics, and a real trace to the block.

Replay: requests in order; a hit is the longest leading run of resident blocks; then all blocks of the
request are inserted, the partial last one included, and the cache is trimmed to capacity one block at
a time (FIFO makes room before each insert instead).
"""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from kvtune.cache.eviction import FIFO, LRU


def leading_run(request, resident):
    return next((i for i, key in enumerate(request) if key not in resident), len(request))


def replay_lru(requests, capacity):
    """Hit blocks, by driving the LRU policy; every key is a block id of its own."""
    policy, resident, hits, ids = LRU(), set(), 0, {}
    for keys in requests:
        request = [ids.setdefault(key, len(ids)) for key in keys]
        hits += leading_run(request, resident)
        for key in request:
            if key in resident:
                policy.pin(key)
            else:
                resident.add(key)
                policy.insert(key, depth=0)
        for key in reversed(request):
            policy.unpin(key)
        while len(resident) > capacity:
            victim = policy.victim()
            policy.remove(victim)
            resident.remove(victim)
    return hits


def replay_fifo(requests, capacity):
    policy, resident, hits = FIFO(), set(), 0
    for request in requests:
        hits += leading_run(request, resident)
        for depth, key in enumerate(request):
            if key in resident:
                continue
            if len(resident) == capacity:
                victim = policy.victim()
                policy.remove(victim)
                resident.remove(victim)
            resident.add(key)
            policy.insert(key, depth=depth)
            policy.unpin(key)
    return hits


def model_lru(requests, capacity):
    """Brute force: a list in order of last use, the head of a request used last."""
    order, hits = [], 0
    for request in requests:
        hits += leading_run(request, order)
        for key in reversed(request):
            if key in order:
                order.remove(key)
            order.append(key)
        del order[: max(0, len(order) - capacity)]
    return hits


def model_fifo(requests, capacity):
    order, hits = [], 0
    for request in requests:
        hits += leading_run(request, order)
        for key in request:
            if key not in order:
                del order[: max(0, len(order) + 1 - capacity)]
                order.append(key)
    return hits


def random_requests(seed):
    """Paths through a binary tree; a key is the whole prefix."""
    rng = random.Random(seed)
    for _ in range(300):
        path = tuple(rng.randrange(2) for _ in range(rng.randrange(1, 7)))
        yield [path[: i + 1] for i in range(len(path))]


@pytest.mark.parametrize("capacity", [1, 4, 9, 30])
@pytest.mark.parametrize("seed", range(4))
def test_policies_replay_as_the_brute_force_model_does(seed, capacity):
    requests = list(random_requests(seed))
    assert replay_lru(requests, capacity) == model_lru(requests, capacity)
    assert replay_fifo(requests, capacity) == model_fifo(requests, capacity)


@pytest.mark.proof
@pytest.mark.skipif("KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES names the folder of traces")
@pytest.mark.parametrize("capacity", [1000, 10000])
@pytest.mark.parametrize(("policy", "replay"), [("lru", replay_lru), ("fifo", replay_fifo)])
def test_replays_the_mooncake_conversation_trace_to_the_block(policy, replay, capacity):
    folder = Path(os.environ["KVTUNE_TRACES"])
    name = "mooncake_conversation.jsonl.gz"
    with gzip.open(folder / name, "rt") as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    expected = json.loads((folder / "expected.json").read_text())[name]["hit_blocks"]
    assert replay(requests, capacity) == expected[str(capacity)][policy]
