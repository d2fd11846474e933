"""How fast a trace is replayed: native core, pure-Python twin, the engine's manager, a plain OrderedDict.

    python benchmarks/bench_replay.py --traces DIR [--runs 5] [--limit N] [--json OUT]

One core, one thread, the conversation trace of Mooncake at 10,000 blocks. References per second are of a
whole replay from an empty cache, the trace in memory; medians of interleaved runs, by the clock on the wall
(on a busy machine the CPU's own time, printed beside it, is the better guess). All replayers of LRU must
hit the same blocks, or there is no figure. The manager's path is match, allocate, commit and free of the
engine's own `KVCacheManager`, with the block hashes of the trace. Bytes per distinct block: what the core
allocates (prefix tree, references, cache, policy) and, apart, the trace's own arrays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.cache import KVCacheManager
from kvtune.cache.replay import DEFAULT_POLICY, Replayer
from kvtune.cache.replay_native import library_path
from kvtune.cache.replay_records import engine_limits
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import BlockHash, RequestId
from kvtune.workload import BlockTrace, block_trace, load_workload

TRACE = "mooncake_conversation.jsonl.gz"
CAPACITY = 10_000
BARS = {
    "lru": (1_000_000, "references/s"),
    "default": (200_000, "references/s"),
    "manager": (150_000, "references/s"),
    "curve": (2.0, "s at most"),
    "bytes_per_distinct_block": (200, "bytes at most"),
}


def ordered_dict(trace: BlockTrace, capacity: int) -> int:
    """LRU as one would write it on a napkin: hit blocks."""
    order: OrderedDict[int, None] = OrderedDict()
    ids, start = trace.block_ids.tolist(), trace.request_start.tolist()
    hits = 0
    for begin, end in itertools.pairwise(start):
        request = ids[begin:end]
        for block in request:
            if block not in order:
                break
            hits += 1
        for block in reversed(request):
            order[block] = None
            order.move_to_end(block)
        while len(order) > capacity:
            order.popitem(last=False)
    return hits


def manager_hits(trace: BlockTrace, capacity: int, policy: str) -> int:
    """Full blocks hit by the engine's manager serving one request after the other."""
    group = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)
    manager = KVCacheManager([group], [capacity], block_size=trace.block_size, policy=policy)
    hashes = [BlockHash(i.to_bytes(8, "little")) for i in range(trace.num_unique)]
    full, hits = engine_limits(trace).num_blocks.tolist(), 0
    start, lengths = trace.request_start.tolist(), trace.prompt_tokens.tolist()
    ids = trace.block_ids.tolist()
    for r, length in enumerate(lengths):
        if not manager.fits(length):
            continue
        request_id, tokens = RequestId(str(r)), range(length)
        known = [hashes[i] for i in ids[start[r] : start[r] + full[r]]]
        match = manager.match(tokens, block_hashes=known)
        if manager.allocate(request_id, length, match=match) is None:
            raise RuntimeError(f"request {r} finds no room in an idle cache")
        manager.commit(request_id, tokens, length)
        manager.free(request_id)
        hits += match.num_tokens // trace.block_size
    return hits


def candidates(trace: BlockTrace) -> dict[str, Callable[[], int]]:
    """What is timed; each answers its hit blocks."""
    cores = ["python"] if library_path() is None else ["native", "python"]
    policies = list(dict.fromkeys(["lru", DEFAULT_POLICY, "optimal_pinned"]))
    timed: dict[str, Callable[[], int]] = {"OrderedDict": lambda: ordered_dict(trace, CAPACITY)}
    for core in cores:
        replayer = Replayer(trace, core=core)
        for policy in policies:
            timed[f"{policy} {core}"] = lambda r=replayer, p=policy: r.replay(p, CAPACITY).blocks_hit
        timed[f"curve {core}"] = lambda r=replayer: r.lru_curve().blocks_hit(CAPACITY)
        engine = Replayer(trace, core=core, full_blocks_only=True)
        timed[f"lru full blocks {core}"] = lambda r=engine: r.replay("lru", CAPACITY).blocks_hit
    for policy in dict.fromkeys(["lru", DEFAULT_POLICY]):
        timed[f"manager {policy}"] = lambda p=policy: manager_hits(trace, CAPACITY, p)
    return timed


def measure(trace: BlockTrace, num_runs: int) -> dict[str, dict[str, Any]]:
    timed = candidates(trace)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    cpu: dict[str, list[float]] = {name: [] for name in timed}
    hits: dict[str, int] = {}
    for _ in range(num_runs):
        for name, run in timed.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            hits[name] = run()
            seconds[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
    return {
        name: {
            "seconds": statistics.median(values),
            "cpu_seconds": statistics.median(cpu[name]),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "references_per_s": trace.num_references / statistics.median(values),
            "blocks_hit": hits[name],
        }
        for name, values in seconds.items()
    }


def refuse_disagreement(figures: dict[str, dict[str, Any]]) -> None:
    same = ["OrderedDict", *(n for n in figures if n.startswith(("lru native", "lru python", "curve")))]
    engine = [n for n in figures if n.startswith(("manager lru", "lru full blocks"))]
    for names in (same, engine):
        if len({figures[name]["blocks_hit"] for name in names}) != 1:
            found = {name: figures[name]["blocks_hit"] for name in names}
            sys.exit(f"no figure: the replayers disagree about the blocks hit: {found}")


def memory(trace: BlockTrace) -> dict[str, float]:
    """Bytes per distinct block."""
    replayer = Replayer(trace)
    found = {
        policy: replayer.replay(policy, CAPACITY).core_bytes
        for policy in dict.fromkeys(["lru", DEFAULT_POLICY, "optimal_pinned"])
    }
    found["curve"] = replayer.lru_curve().core_bytes
    arrays = (trace.block_ids, trace.request_start, trace.block_tokens, trace.prompt_tokens)
    found["trace arrays"] = sum(array.nbytes for array in arrays)
    return {name: size / trace.num_unique for name, size in found.items() if size is not None}


def verdicts(figures: dict[str, dict[str, Any]], sizes: dict[str, float]) -> dict[str, dict[str, Any]]:
    core = "python" if library_path() is None else "native"
    found = {
        "lru": figures[f"lru {core}"]["references_per_s"],
        "default": figures[f"{DEFAULT_POLICY} {core}"]["references_per_s"],
        "manager": figures["manager lru"]["references_per_s"],
        "curve": figures[f"curve {core}"]["seconds"],
        "bytes_per_distinct_block": max(v for name, v in sizes.items() if name != "trace arrays"),
    }
    return {
        name: {
            "found": value,
            "bar": BARS[name][0],
            "unit": BARS[name][1],
            "holds": bool(value <= BARS[name][0] if "most" in BARS[name][1] else value >= BARS[name][0]),
        }
        for name, value in found.items()
    }


def show(record: dict[str, Any]) -> None:
    print(f"{record['trace']}: {record['num_references']:,} references, {record['capacity_blocks']:,} blocks")
    for name, row in record["figures"].items():
        rate = f"{row['references_per_s'] / 1e6:10.3f} M references/s"
        took = f"{row['seconds'] * 1e3:12.1f} ms, {row['cpu_seconds'] * 1e3:.1f} of the CPU"
        print(f"  {name:28}{rate}{took}   spread {row['spread']:.0%}")
    for name, size in record["bytes_per_distinct_block"].items():
        print(f"  {name:28}{size:10.1f} bytes per distinct block")
    for name, row in record["bars"].items():
        word = "holds" if row["holds"] else "FAILS"
        print(f"  {word}  {name}: {row['found']:,.2f}, bar {row['bar']:,} {row['unit']}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, default=os.environ.get("KVTUNE_TRACES"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=int, help="the first N requests only, to try the script")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    if args.traces is None:
        parser.error(f"give --traces DIR (or KVTUNE_TRACES) with {TRACE}")
    trace = block_trace(load_workload(Path(args.traces) / TRACE, limit=args.limit))
    figures = measure(trace, args.runs)
    refuse_disagreement(figures)
    sizes = memory(trace)
    record = {
        "trace": TRACE,
        "num_requests": trace.num_requests,
        "num_references": trace.num_references,
        "num_unique": trace.num_unique,
        "capacity_blocks": CAPACITY,
        "default_policy": DEFAULT_POLICY,
        "runs": args.runs,
        "figures": figures,
        "bytes_per_distinct_block": sizes,
        "bars": verdicts(figures, sizes),
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version(),
                    "numpy": np.__version__, "load": os.getloadavg()},
    }  # fmt: skip
    show(record)
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
