"""What the block manager costs per block, beside vLLM's own, and the scheduler per step.

    python benchmarks/bench_control_plane.py [--rounds 5] [--requests 600] [--json OUT]

Run with an interpreter that has vLLM (PYTHONPATH=src) to measure the peer too; without it the peer is left
out. 600 prompts of block size 16: a shared prefix of 4,096 tokens (one of eight) and 512-8,192 tokens of
their own; 32 of them are held at a time, in a pool that evicts. One request's life is hashing its blocks
(SHA-256 chain), looking up its prefix, taking blocks, publishing them, and giving them back; time per block
is the CPU time of all lives over all full blocks of all prompts. Contenders take turns, one run of all
requests each, from an empty pool; the ratio is of medians. Our managers are given token arrays, as our engine
keeps them, vLLM's lists, as its engine does; its blocks are hashed as its requests are made, as there.

Memory: growth of the process while an empty pool of `--memory-blocks` blocks fills with cached blocks, and
then while as many are evicted and others cached, per block. Steps: `Scheduler.schedule` and `update` of
decoding sequences, and of the same beside idle ones (waiting for a leader, in the queue).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.sched import Scheduler
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import Request, RequestId, RunnerOutput, Sampled, SamplingParams

BLOCK = 16
PREFIX_TOKENS, NUM_PREFIXES = 4096, 8
OWN_TOKENS = (512, 8192)
HELD = 32
POOL_BLOCKS = 60_000
GROUP = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=8, k_head_dim=128, v_head_dim=128)
PHASES = ("hash", "match", "allocate", "commit", "free")


@dataclass
class Life:
    """Seconds of CPU time by phase over one run, and what it hit."""

    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    total: float = 0.0
    hit_blocks: int = 0
    evicted_blocks: int = 0


Serve = Callable[[list[np.ndarray], Life], None]


def prompts_of(num_requests: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(0, 128_000, (NUM_PREFIXES, PREFIX_TOKENS), dtype=np.int32)
    lengths = rng.integers(OWN_TOKENS[0], OWN_TOKENS[1] + 1, num_requests)
    return [
        np.concatenate([prefixes[i % NUM_PREFIXES], rng.integers(0, 128_000, n, dtype=np.int32)])
        for i, n in enumerate(lengths)
    ]


def num_full_blocks(prompts: list[np.ndarray]) -> int:
    return sum(len(prompt) // BLOCK for prompt in prompts)


def ours(policy: str, native: bool) -> Serve:
    """One life after the other over a fresh manager of ours."""

    def serve(prompts: list[np.ndarray], life: Life) -> None:
        manager = KVCacheManager([GROUP], [POOL_BLOCKS], block_size=BLOCK, policy=policy, native=native)
        held: deque[RequestId] = deque()
        phases, clock = life.phases, time.perf_counter
        for i, prompt in enumerate(prompts):
            request_id = RequestId(str(i))
            t0 = clock()
            match = manager.match(prompt)
            t1 = clock()
            assert manager.allocate(request_id, len(prompt), match=match) is not None
            t2 = clock()
            manager.commit(request_id, prompt, len(prompt))
            t3 = clock()
            held.append(request_id)
            if len(held) == HELD:
                manager.free(held.popleft())
            t4 = clock()
            life.hit_blocks += match.num_tokens // BLOCK
            phases["match"] += t1 - t0
            phases["allocate"] += t2 - t1
            phases["commit"] += t3 - t2
            phases["free"] += t4 - t3
        life.evicted_blocks = manager.stats().evicted_blocks

    return serve


def vllm() -> Serve:
    """The same lives over vLLM's manager; blocks are published as they are taken."""
    import torch
    from vllm import SamplingParams as TheirParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager as Theirs
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request as TheirRequest

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    params = TheirParams(max_tokens=16)
    lists: dict[int, list[int]] = {}

    def serve(prompts: list[np.ndarray], life: Life) -> None:
        if not lists:
            lists.update({i: prompt.tolist() for i, prompt in enumerate(prompts)})
        config = KVCacheConfig(POOL_BLOCKS + 1, [], [KVCacheGroupSpec(["layer"], spec)])  # one is their null
        manager = Theirs(
            config, max_model_len=1 << 20, scheduler_block_size=BLOCK, hash_block_size=BLOCK, log_stats=False
        )
        held: deque[TheirRequest] = deque()
        phases, clock = life.phases, time.perf_counter
        for i in range(len(prompts)):
            t0 = clock()
            request = TheirRequest(
                request_id=str(i), prompt_token_ids=lists[i], sampling_params=params, pooling_params=None,
                block_hasher=hasher,
            )  # fmt: skip
            t1 = clock()
            blocks, num_hit, *_ = manager.get_computed_blocks(request)
            t2 = clock()
            taken = manager.allocate_slots(request, len(lists[i]) - num_hit, num_hit, blocks)
            t3 = clock()
            assert taken is not None
            held.append(request)
            if len(held) == HELD:
                manager.free(held.popleft())
            t4 = clock()
            life.hit_blocks += num_hit // BLOCK
            phases["hash"] += t1 - t0
            phases["match"] += t2 - t1
            phases["allocate"] += t3 - t2
            phases["free"] += t4 - t3

    return serve


def contenders() -> dict[str, Serve]:
    found = {
        f"{'native' if native else 'python'} {policy}": ours(policy, native=native)
        for policy in ("lru", "guarded")
        for native in (True, False)
    }
    if importlib.util.find_spec("vllm") is not None:
        found = {"vllm": vllm(), **found}
    return found


def lives(calls: dict[str, Serve], prompts: list[np.ndarray], rounds: int) -> dict[str, list[Life]]:
    """`rounds` runs of every contender in turn, each round starting one later than the round before."""
    names = list(calls)
    runs: dict[str, list[Life]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            gc.collect()
            life = Life()
            start = time.thread_time()
            calls[name](prompts, life)
            life.total = time.thread_time() - start
            runs[name].append(life)
    hits = {name: found[0].hit_blocks for name, found in runs.items()}
    lru = {n: h for n, h in hits.items() if "guarded" not in n}
    if len(set(lru.values())) != 1:
        raise SystemExit(f"the managers do not hit the same blocks: {hits}")
    return runs


# --- memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bytes_per_block(policy: str, native: bool, num_blocks: int) -> dict[str, float]:
    """Growth of this process per cached block: all blocks cached and idle; then five pools' worth evicted."""
    manager = KVCacheManager([GROUP], [num_blocks], block_size=BLOCK, policy=policy, native=native)
    rng = np.random.default_rng(1)
    prompt_blocks = 1000
    gc.collect()
    before = resident_bytes()

    def fill(num_prompts: int) -> float:
        for _ in range(num_prompts):
            tokens = rng.integers(0, 128_000, prompt_blocks * BLOCK, dtype=np.int32)
            request_id = RequestId("r")
            assert manager.allocate(request_id, len(tokens), match=manager.match(tokens)) is not None
            manager.commit(request_id, tokens, len(tokens))
            manager.free(request_id)
        gc.collect()
        return (resident_bytes() - before) / num_blocks

    cached = fill(num_blocks // prompt_blocks)
    evicted = fill(5 * num_blocks // prompt_blocks)
    usage = manager.usage()[0]
    assert usage.idle > num_blocks - prompt_blocks
    return {"cached": cached, "with_evictions_remembered": evicted}


def in_fresh_process(policy: str, num_blocks: int) -> dict[str, float]:
    """Where no memory lies about that could be used again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(bytes_per_block, (policy, True, num_blocks))


# --- steps of the scheduler


def steps_s(
    num_running: int, num_idle: int, *, native: bool, policy: str = "lru", steps: int = 48
) -> list[float]:
    """CPU seconds of `schedule` and `update` of each step in which `num_running` sequences decode; `num_idle`
    more wait in the queue, where the batch has no seat for them."""
    context = 256
    num_blocks = num_running * (context // BLOCK + 8)
    manager = KVCacheManager([GROUP], [num_blocks], block_size=BLOCK, policy=policy, native=native)
    config = SchedulerConfig(
        max_num_seqs=num_running, max_num_batched_tokens=1 << 20, max_prefill_chunk=1 << 20,
        max_prefill_beside_decodes=1 << 20,
    )  # fmt: skip
    scheduler = Scheduler(manager, config, max_model_len=1 << 20, clock=time.monotonic)
    rng = np.random.default_rng(2)
    for i in range(num_running + num_idle):
        length = context - int(rng.integers(0, BLOCK))
        scheduler.add(
            Request(
                request_id=RequestId(str(i)),
                prompt_token_ids=rng.integers(0, 128_000, length, dtype=np.int32),
                sampling=SamplingParams(max_tokens=4096, ignore_eos=True),
                arrival_s=float(i),
            )
        )
    times: list[float] = []
    for _ in range(steps + 1):
        start = time.thread_time()
        output = scheduler.schedule()
        decided = time.thread_time()
        sampled = tuple(Sampled(request_id=c.request_id, token_id=7) for c in output.chunks)
        resumed = time.thread_time()
        scheduler.update(output, RunnerOutput(sampled=sampled))
        times.append(decided - start + time.thread_time() - resumed)
    assert scheduler.num_running == num_running and scheduler.num_waiting == num_idle
    return times[1:]  # the first one is prefill


# --- telling


def lives_report(runs: dict[str, list[Life]], num_blocks: int) -> dict[str, dict[str, object]]:
    """Microseconds a block by contender; `of_peer`: share of vLLM's."""
    medians = {name: statistics.median(life.total for life in found) for name, found in runs.items()}
    return {
        name: {
            "us_per_block": round(1e6 * medians[name] / num_blocks, 3),
            "spread_us": [round(1e6 * f(life.total for life in found) / num_blocks, 3) for f in (min, max)],
            "of_peer": round(medians[name] / medians["vllm"], 3) if "vllm" in medians else None,
            "hit_blocks": found[0].hit_blocks,
            "evicted_blocks": found[0].evicted_blocks,
            "wall_phases_us": {
                phase: round(1e6 * statistics.median(life.phases[phase] for life in found) / num_blocks, 3)
                for phase in PHASES
            },
        }
        for name, found in runs.items()
    }


def steps_report() -> list[dict[str, object]]:
    """Milliseconds a step: median, and the slowest of a round of block boundaries."""
    rows: list[dict[str, object]] = []
    for native in (True, False):
        for num_running, num_idle in ((100, 0), (1000, 0), (1000, 1000), (1000, 10_000)):
            times = steps_s(num_running, num_idle, native=native)
            rows.append(
                {
                    "pools": "native" if native else "python",
                    "running": num_running,
                    "idle": num_idle,
                    "median_ms": round(1e3 * statistics.median(times), 3),
                    "slowest_ms": round(1e3 * max(times), 3),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--memory-blocks", type=int, default=200_000, help="0: leave memory out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prompts = prompts_of(arguments.requests)
    num_blocks = num_full_blocks(prompts)
    report: dict[str, object] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "requests": len(prompts),
        "blocks": num_blocks,
        "lives": lives_report(lives(contenders(), prompts, arguments.rounds), num_blocks),
        "steps": steps_report(),
    }
    if arguments.memory_blocks:
        report["bytes_per_block"] = {
            policy: in_fresh_process(policy, arguments.memory_blocks) for policy in ("lru", "guarded")
        }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
