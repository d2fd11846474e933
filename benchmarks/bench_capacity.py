"""How many real requests one KV budget holds: fixed pre-allocation, paged bf16, and a recipe.

64 requests with the lengths of a public trace, all at once, on one engine. Fixed pre-allocation is the same
engine with one block per sequence of the model's full length, so the three differ in the cache alone.

    python benchmarks/bench_capacity.py --trace azure2023_conv.csv.gz [--recipe recipe.json] [--json OUT]

held: the largest number of requests, in trace order, that the budget keeps fully resident to their last
token: predicted from block counts, then shown by a run that must neither queue nor preempt. A scheme's TPOT
is compared with an unconstrained paged bf16 engine running the same requests (interleaved, medians); a
number is reduced until that ratio is at most 1.1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.config import format_bytes
from kvtune.engine.load import LoadedModel, load_model
from kvtune.errors import KVTuneError
from kvtune.recipe import Recipe
from kvtune.spec import KVFormat, growth_bytes_per_token
from kvtune.testing.reference import reference_model_path
from kvtune.workload import TokenRequest, load_workload, materialise

LIMIT = 1.1


@dataclass
class Run:
    """One run: bytes at the moment of most referenced bytes, speed, and what went wrong."""

    tpot_s: float
    duration_s: float
    peak_running: int
    preemptions: int
    resident: int
    referenced: int
    idle: int
    allocated: int


def drive(engine: Engine, requests: list[TokenRequest]) -> Run:
    """Send everything at once; sample memory every 8 steps."""
    engine.reset_prefix_cache()
    before = engine.stats().counters()["preemptions"]
    start = time.monotonic()
    for i, request in enumerate(requests):
        engine.add_request(
            f"r{i}",
            list(request.prompt_token_ids),
            SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True),
        )
    tpots: list[float] = []
    peak, memory, steps = 0, engine.memory(), 0
    while engine.has_unfinished:
        for output in engine.step(finished_only=True):
            if output.metrics.tpot_s is not None:
                tpots.append(output.metrics.tpot_s)
        peak = max(peak, engine.num_running)
        steps += 1
        if steps % 8 == 0:
            now = engine.memory()
            memory = now if now.referenced_bytes > memory.referenced_bytes else memory
    return Run(
        tpot_s=statistics.median(tpots),
        duration_s=time.monotonic() - start,
        peak_running=peak,
        preemptions=int(engine.stats().counters()["preemptions"] - before),
        resident=memory.resident_bytes,
        referenced=memory.referenced_bytes,
        idle=memory.idle_bytes,
        allocated=memory.allocated_bytes,
    )


def fitting(requests: list[TokenRequest], num_blocks: int, block_size: int) -> int:
    """How many requests, in order, fit with all their tokens at once."""
    used = 0
    for n, request in enumerate(requests):
        used += -(-(len(request.prompt_token_ids) + request.max_tokens) // block_size)
        if used > num_blocks:
            return n
    return len(requests)


def engine_for(loaded: LoadedModel, cache: CacheConfig, budget: int | str, length: int) -> Engine:
    # No watermark and no reserve: the question is how many requests the bytes hold.
    scheduler = SchedulerConfig(
        max_num_seqs=256, max_num_batched_tokens=1024, max_prefill_chunk=1024,
        max_prefill_beside_decodes=1024, watermark=0.0, reserved=0.0,
    )  # fmt: skip
    return Engine.from_pretrained(
        loaded,
        cache=replace(cache, kv_budget=budget),
        scheduler=scheduler,
        config=EngineConfig(max_model_len=length),
    )


def measure(
    loaded: LoadedModel,
    cache: CacheConfig,
    requests: list[TokenRequest],
    *,
    budget: int,
    length: int,
    repeats: int,
) -> dict[str, Any]:
    with engine_for(loaded, cache, budget, length) as probe:
        blocks = probe.stats().blocks[0]
        held = fitting(requests, blocks.total, cache.block_size)
        alone = drive(probe, requests)  # all requests on this budget: bytes under pressure
    ratios: list[float] = []
    runs: list[Run] = []
    reference_cache = CacheConfig(enable_prefix_caching=cache.enable_prefix_caching)
    ample = bf16_bytes(loaded, sum(len(r.prompt_token_ids) + r.max_tokens for r in requests)) * 5 // 4
    while held:
        chosen = requests[:held]
        pairs: list[tuple[Run, Run]] = []
        with (
            engine_for(loaded, cache, budget, length) as ours,
            engine_for(loaded, reference_cache, ample, length) as base,
        ):
            for _ in range(repeats):
                pairs.append((drive(ours, chosen), drive(base, chosen)))
        ratios = [a.tpot_s / b.tpot_s for a, b in pairs]
        runs = [a for a, _ in pairs]
        if statistics.median(ratios) <= LIMIT and all(run.preemptions == 0 for run in runs):
            break
        held = min(held - 1, int(held * 0.9))
    return {
        "held": held,
        "tpot_ratio_same_requests": statistics.median(ratios) if ratios else None,
        "tpot_ratio_spread": [min(ratios), max(ratios)] if ratios else None,
        "tpot_s": statistics.median(run.tpot_s for run in runs) if runs else None,
        "peak_running": max((run.peak_running for run in runs), default=0),
        "all_requests": asdict(alone),
        "block_size": cache.block_size,
        "k_codec": cache.k_codec,
        "v_codec": cache.v_codec,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", required=True, type=Path)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument(
        "--fixed-slots", type=int, default=4, help="the budget: this many full-length bf16 slots"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    length = args.max_model_len
    torch.set_num_threads(args.threads)
    config = EngineConfig(max_model_len=length)
    loaded = load_model(args.model or reference_model_path(), config)
    workload = load_workload(args.trace, limit=4 * args.num_requests)
    made = materialise(workload, vocab_size=loaded.vocab_size, max_model_len=length + 1, scale=1.0)
    fits = [r for r in made.requests if len(r.prompt_token_ids) + r.max_tokens <= length]
    requests = fits[: args.num_requests]
    taken = {r.request_id for r in requests}
    last = next(i for i, r in enumerate(workload.requests) if r.request_id == requests[-1].request_id)
    dropped = sum(1 for r in workload.requests[: last + 1] if r.request_id not in taken)
    bf16 = CacheConfig()
    winner = (
        Recipe.load(args.recipe).cache_config()
        if args.recipe
        else CacheConfig(k_codec="int8", v_codec="int8")
    )
    schemes = {
        "fixed pre-allocation bf16": CacheConfig(block_size=length, enable_prefix_caching=False),
        "paged bf16": bf16,
        "recipe": winner,
    }
    budget = bf16_bytes(loaded, args.fixed_slots * length)
    results = {
        name: measure(loaded, cache, requests, budget=budget, length=length, repeats=args.repeats)
        for name, cache in schemes.items()
    }
    report = {
        "benchmark": "capacity",
        "load_average": os.getloadavg()[0],
        "hardware": {
            "machine": platform.machine(),
            "processor": cpu_name(),
            "python": platform.python_version(),
        },
        "trace": args.trace.name,
        "requests": len(requests),
        "dropped_over_length": dropped,
        "max_model_len": length,
        "kv_budget_bytes": budget,
        "schemes": results,
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def bf16_bytes(loaded: LoadedModel, num_tokens: int) -> int:
    return round(growth_bytes_per_token(loaded.spec, KVFormat.of("bf16"))) * num_tokens


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def show(report: dict[str, Any]) -> None:
    schemes: dict[str, dict[str, Any]] = report["schemes"]
    budget, length = format_bytes(report["kv_budget_bytes"]), report["max_model_len"]
    print(f"{report['requests']} requests of {report['trace']} at scale 1, KV budget {budget}")
    print(f"{report['dropped_over_length']} requests longer than {length} tokens were dropped")
    columns = ("held", "TPOT ratio", "resident", "referenced", "idle")
    print(f"{'scheme':28} {'K/V':10}" + "".join(f"{name:>12}" for name in columns))
    for name, row in schemes.items():
        under = row["all_requests"]
        sizes = [format_bytes(under[key]) for key in ("resident", "referenced", "idle")]
        ratio = row["tpot_ratio_same_requests"]
        cells = [str(row["held"]), "-" if ratio is None else f"{ratio:.3f}", *sizes]
        print(f"{name:28} {row['k_codec'] + '/' + row['v_codec']:10}" + "".join(f"{c:>12}" for c in cells))
    held = {name: max(1, row["held"]) for name, row in schemes.items()}
    over_fixed = held["recipe"] / held["fixed pre-allocation bf16"]
    over_paged = held["recipe"] / held["paged bf16"]
    print(
        f"gain of the recipe: {over_fixed:.2f}x over fixed pre-allocation, {over_paged:.2f}x over paged bf16"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KVTuneError as error:
        sys.exit(f"bench_capacity: {error}")
