"""Paged decode attention of every codec against torch's SDPA over contiguous bf16, in one process.

Each cell is timed in rounds: every contender runs once per round, in turn, so that drift of the machine hits
all of them alike; medians and interquartile ranges are over rounds. Only ratios mean anything on a shared
machine. With one thread the clock is the thread's CPU time, which leaves out the time slices of other
processes (not their cache and bandwidth use); with more it is wall time.

Two SDPA contenders: `sdpa` is the plain call (enable_gqa), `sdpa_grouped` folds the query heads that share
a KV head into query rows, so that torch too reads K and V once.

    python benchmarks/bench_decode.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvtune.codecs import write_kv
from kvtune.kernels import AttentionBatch, Backend, LayerCache, choose_backend, paged_attention
from kvtune.spec import PackedLayout

CODECS = [("bf16", "bf16"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("fp32", "fp32"),
          ("n8_rh", "n8_rh"), ("int4_rh", "int4_rh"), ("fp8", "fp8")]  # fmt: skip
SHAPES = [(8, 4, 128), (8, 1, 128), (4, 8, 64)]
"""(KV heads, query heads per KV head, head dim)."""
CONTEXTS = [2048, 4096, 8192, 16384]
TOKENS = 32768
"""Tokens per cell: sequences = TOKENS / context, so that every cell reads the same number of bytes."""


def make_cache(codecs: tuple[str, str], num_seqs: int, context: int, heads: int, dim: int, backend: Backend):
    """A cache filled with normal K and V through shuffled 16-token blocks, and its block table."""
    layout = PackedLayout(
        block_size=16,
        num_kv_heads=heads,
        k_head_dim=dim,
        v_head_dim=dim,
        k_codec=codecs[0],
        v_codec=codecs[1],
    )
    num_blocks = num_seqs * context // 16
    cache = LayerCache.allocate(layout, num_blocks)
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = table.view(num_seqs, -1)
    positions = torch.arange(context)
    for s in range(num_seqs):
        k, v = torch.randn(2, context, heads, dim, generator=torch.Generator().manual_seed(s)).unbind(0)
        write_kv(cache, k, v, table[s][positions // 16].long() * 16 + positions % 16, backend=backend)
    return cache, table


def contenders(
    shape: tuple[int, int, int], context: int, backend: Backend
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, int]]:
    """Name -> call, and name -> bytes of K and V the call has to read."""
    heads, group, dim = shape
    num_seqs = TOKENS // context
    q = torch.randn(num_seqs, heads * group, dim, generator=torch.Generator().manual_seed(7))
    q16 = q.to(torch.bfloat16)
    batch_start = torch.arange(num_seqs + 1, dtype=torch.int32)
    lengths = torch.full((num_seqs,), context, dtype=torch.int32)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    sizes: dict[str, int] = {}
    for codecs in CODECS:
        cache, table = make_cache(codecs, num_seqs, context, heads, dim, backend)
        batch = AttentionBatch(batch_start, lengths, table, torch.full((num_seqs,), -1))
        name = f"{codecs[0]}/{codecs[1]}"
        calls[name] = lambda c=cache, b=batch: paged_attention(q16, c, b, scale=dim**-0.5, backend=backend)
        sizes[name] = cache.layout.block_bytes // 16 * num_seqs * context
    k, v = torch.randn(2, num_seqs, heads, context, dim).to(torch.bfloat16).unbind(0)
    one_row, rows = q16.unsqueeze(2), q16.view(num_seqs, heads, group, dim)
    calls["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(one_row, k, v, enable_gqa=True)
    calls["sdpa_grouped"] = lambda: torch.nn.functional.scaled_dot_product_attention(rows, k, v)
    sizes["sdpa"] = sizes["sdpa_grouped"] = 2 * k.numel() * 2
    return calls, sizes


def measure(calls: dict[str, Callable[[], torch.Tensor]], rounds: int, clock: Callable[[], float]):
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def read_bandwidth(clock: Callable[[], float]) -> float:
    """GB/s of summing a 768 MB float32 buffer with the same threads: the limit for reading K and V."""
    buffer = torch.ones(192 << 20)
    times = measure({"read": buffer.sum}, 5, clock)["read"]
    return buffer.numel() * 4 / statistics.median(times) / 1e9


def cell(shape: tuple[int, int, int], context: int, backend: Backend, rounds: int, clock) -> dict:
    calls, sizes = contenders(shape, context, backend)
    times = measure(calls, rounds, clock)
    result = {"kv_heads": shape[0], "group": shape[1], "head_dim": shape[2], "context": context, "ms": {}}
    base = {name: statistics.median(times[name]) for name in calls}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        result["ms"][name] = {
            "median": round(base[name] * 1e3, 3),
            "iqr": [round(low * 1e3, 3), round(high * 1e3, 3)],
            "kv_mb": round(sizes[name] / 1e6, 1),
            "gb_per_s": round(sizes[name] / base[name] / 1e9, 2),
            "speedup_over_sdpa": round(base["sdpa"] / base[name], 2),
            "speedup_over_sdpa_grouped": round(base["sdpa_grouped"] / base[name], 2),
            "speedup_over_paged_bf16": round(base["bf16/bf16"] / base[name], 2),
        }
    return result


def l3_size() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return path.read_text().strip() if path.is_file() else "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, two contexts, few rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    backend = choose_backend("auto")
    rounds = 5 if args.quick else args.rounds
    shapes, contexts = (SHAPES[:1], [2048, 16384]) if args.quick else (SHAPES, CONTEXTS)
    load = os.getloadavg()[0]
    result = {
        "benchmark": "paged decode attention",
        "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs, L3 {l3_size()}",
        "kernels": backend.reason,
        "torch": torch.__version__,
        "threads": args.threads,
        "clock": clock.__name__,
        "rounds": rounds,
        "load_average_before": round(load, 2),
        "read_bandwidth_gb_per_s": round(read_bandwidth(clock), 1),
        "cells": [],
    }
    print(f"{result['hardware']}; {backend.reason}; torch {torch.__version__}; {args.threads} thread(s)")
    print(f"read bandwidth {result['read_bandwidth_gb_per_s']} GB/s, load {load:.1f}, {rounds} rounds")
    for shape, context in itertools.product(shapes, contexts):
        found = cell(shape, context, backend, rounds, clock)
        result["cells"].append(found)
        print(f"\nKV heads {shape[0]}, group {shape[1]}, head dim {shape[2]}, context {context}")
        for name, m in found["ms"].items():
            print(
                f"  {name:13} {m['median']:9.2f} ms  iqr {m['iqr'][0]:.2f}..{m['iqr'][1]:.2f}  "
                f"{m['gb_per_s']:6.1f} GB/s  x{m['speedup_over_sdpa']:.1f} sdpa  "
                f"x{m['speedup_over_sdpa_grouped']:.1f} grouped  "
                f"x{m['speedup_over_paged_bf16']:.2f} paged bf16"
            )
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
