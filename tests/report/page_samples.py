"""Records as `plan --json` and `simulate --json` print them, small, hostile where strings are."""

from __future__ import annotations

import math
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>\"'`|*<!--"


def hits(rate: float, capacity: int | str, total: int = 10_000) -> dict[str, Any]:
    return {
        "capacity_blocks": capacity,
        "blocks_hit": round(rate * total),
        "block_hit_rate": rate,
        "token_hit_rate": rate * 1.02,
    }


def cache_row(capacity: int | str, lru: float, ours: float, oracle: float) -> dict[str, Any]:
    def gain(rate: float) -> dict[str, Any]:
        return {"policy": "lru", **hits(rate, capacity), "block_hit_rate_gain": rate - lru, "gap_closed": 0.4}

    gap = oracle - lru
    return {
        "capacity_blocks": capacity,
        "capacity_bytes": capacity * 67_108_864 if isinstance(capacity, int) else None,
        "policies": {
            HOSTILE: {**hits(ours, capacity), "gap_closed": (ours - lru) / gap if gap else None},
            "lru": {**hits(lru, capacity), "gap_closed": 0.0 if gap else None},
        },
        "lru": hits(lru, capacity),
        "oracle": {"policy": "optimal_pinned", **hits(oracle, capacity)},
        "lru_blocks_for_oracle": 8048,
        "what_if": {"half_bytes_per_block": gain(min(oracle, lru * 1.5)), "more_memory": gain(lru + 0.01)},
    }


def curve() -> dict[str, Any]:
    sizes = [round(10 ** (0.25 * step)) for step in range(21)]
    points = [hits(0.366 / (1 + (6000 / size) ** 1.2), size) for size in sizes]
    return {
        "points": points,
        "knee": points[16],
        "enough": {"share": 0.9, **points[18]},
        "unbounded": points[-1],
    }


def histogram() -> dict[str, Any]:
    return {
        "edges": [2 ** (step / 4) for step in range(21)],
        "counts": [step * (20 - step) for step in range(20)],
    }


def statistics() -> dict[str, Any]:
    lengths = {
        "unit": "tokens",
        "n": 12031,
        "mean": 12035.1,
        "p50": 6909.0,
        "p90": 27367.0,
        "p99": 85400.0,
        "min": 890,
        "max": 126_195,
        "histogram": histogram(),
    }
    return {
        "num_requests": 12031,
        "num_sessions": 7373,
        "duration_s": 3537.0,
        "input_tokens": lengths,
        "output_tokens": {**lengths, "p50": 350.0, "max": 2000},
        "arrivals": {"rate_per_s": 3.401, "kind": "uneven"},
        "prefix": {"ideal_token_hit_rate": 0.374},
        "reuse": {
            "popularity": {"never_reused_share": 0.758, "top_tenth_share_of_reuse": 0.751},
            "gaps": {"seconds": {"p50": 114.0, "p90": 519.0}},
            "reused_within_s": {"1": 0.038, "60": 0.104, "600": 0.36, "1800": 0.39},
            "depth": [
                {"from_block": 0, "to_block": 1, "references": 12031, "hit_rate": 0.99},
                {"from_block": 1, "to_block": 2, "references": 9000, "hit_rate": 0.39},
            ],
        },
        "stationarity": {"verdict": "drifting", "reasons": ["prompt lengths grow by 34 %"]},
        "notes": [f"a note with {HOSTILE}"],
    }


def cache_record() -> dict[str, Any]:
    rows = [
        cache_row(1000, 0.0445, 0.0753, 0.179),
        cache_row(5859, 0.136, 0.12, 0.352),
        cache_row(100_000, 0.3637, 0.3641, 0.3664),
        cache_row("inf", 0.3664, 0.3664, 0.3664),
    ]
    return {
        "schema_version": 1,
        "path": f"/traces/{HOSTILE}",
        "policy": HOSTILE,
        "block_size": 512,
        "block_bytes": 67_108_864,
        "num_requests": 12031,
        **hits(0.0753, 1000),
        "capacities": rows,
        "tenants": [
            {"tenant": HOSTILE, "num_requests": 10, "block_hit_rate": 0.25, "token_hit_rate": 0.26},
            {"tenant": "", "num_requests": 5, "block_hit_rate": 0.5, "token_hit_rate": 0.51},
        ],
        "more_memory": {"asked": "32GiB", "blocks": 512},
        "notes": [HOSTILE],
        "curve": curve(),
        "statistics": statistics(),
    }


def serve_record() -> dict[str, Any]:
    bins = 48
    wave = [1 + math.sin(step / 5) for step in range(bins)]
    latencies = {
        f"{level}_{name}_ms": 10.0 * (1 + place) * (1 + at)
        for place, name in enumerate(("ttft", "tpot", "itl", "e2el", "queue"))
        for at, level in enumerate(("mean", "median", "p90", "p95", "p99"))
    }
    return {
        "schema_version": 1,
        "mode": "serve",
        "model_id": f"org/{HOSTILE}",
        "workload": "/traces/azure.csv.gz",
        "num_prompts": 1500,
        "completed": 1499,
        "failed": 1,
        "duration": 1480.0,
        "request_throughput": 1.011,
        "output_throughput": 356.4,
        "total_token_throughput": 900.0,
        **latencies,
        "hits_by_tier": {"device": 820_736},
        "token_hit_rate": 0.0391,
        "missed_tokens": {"never_seen": 900, "evicted": 100},
        "evicted_blocks": 12,
        "preemptions": 7,
        "preempted_requests": 6,
        "recomputed_tokens": 512,
        "steps": 9000,
        "utilisation": {
            "busy": 0.93,
            "kv_referenced_mean": 0.48,
            "kv_referenced_peak": 0.84,
            "running_mean": 13.5,
            "running_peak": 35.0,
            "tokens_per_step_mean": 490.2,
        },
        "slo": {"ttft_s": 2.0, "tpot_s": 0.05, "e2e_s": None, "attainment": 0.731, "request_goodput": 0.74},
        "overload": {
            "waiting_peak": 44.0,
            "queueing_share_of_time": 0.31,
            "longest_queueing_s": 120.5,
            "requests_in_longest_queueing": 91,
            "p95_ttft_ms_inside": 4400.0,
            "p95_ttft_ms_outside": 150.0,
            "drain_s": 4.0,
            "is_sustained": False,
        },
        "timeline": {
            "bin_s": 30.0,
            "start_s": [30.0 * step for step in range(bins)],
            "arrivals": [3] * bins,
            "completed": [2] * bins,
            "busy": [0.9] * bins,
            "running": [8 * w for w in wave],
            "waiting": wave,
            "kv_referenced": [None, *(0.4 * w for w in wave[1:])],
            "kv_idle": [0.2] * bins,
            "decode_tokens_per_s": [300.0] * bins,
            "prefill_tokens_per_s": [9000.0] * bins,
            "token_hit_rate": [None] * 3 + [0.04] * (bins - 3),
            "preemptions": [0.0] * (bins - 1) + [7.0],
            "p95_ttft_ms": [100.0 * w for w in wave],
        },
        "cost_model": {"source": "fitted", "note": HOSTILE},
        "server": {"max_model_len": 8192, "num_blocks": 4000},
        "notes": ["simulated"],
        "statistics": statistics(),
    }


def holding(**more: Any) -> dict[str, Any]:
    return {
        "num_requests": 90,
        "mean_bytes": 1.6e9,
        "longest_tokens": 126_527,
        "longest_bytes": 16_584_278_016,
        "expected": 36.2,
        "guaranteed": 3,
        **more,
    }


def change(name: str, expected: float, *, second: bool = False) -> dict[str, Any]:
    return {
        "change": name,
        "kind": name.split("=", maxsplit=1)[0],
        "limit": 1,
        "codec": None,
        "touched_share": 0.099,
        "lost_tokens_share": 0.396,
        "main": holding(),
        "second": holding() if second else None,
        "second_memory_share": 0.396 if second else 0.0,
        "gain_expected": expected,
        "gain_guaranteed": 4.5,
        "hit_rate": None if second else 0.061,
    }


def plan_record() -> dict[str, Any]:
    parts = {
        "logical_bytes": 1_073_741_824,
        "allocator_bytes": 1_090_519_040,
        "replication_bytes": 0,
        "window_slack_bytes": 16_777_216,
        "rounding_bytes": 0,
        "padding_bytes": 0,
        "groups": [],
    }
    return {
        "schema_version": 1,
        "model": HOSTILE,
        "engine": "kvtune",
        "block_size": 16,
        "kv": {
            "growth_bytes_per_token": 131_072,
            "fixed_bytes_per_sequence": 0,
            "layers": [
                {
                    "kind": "full_attention",
                    "count": 32,
                    "num_kv_heads": 8,
                    "k_head_dim": 128,
                    "v_head_dim": 128,
                    "window": None,
                    "bytes_per_token": 4096,
                    "state_bytes": 0,
                }
            ],
        },
        "at_context": {"8192": parts, "131072": parts},
        "capacity": [
            {
                "gpu": "H100-80GB",
                "num_gpus": 1,
                "kv_budget_bytes": 58_760_722_841,
                "max_tokens": 448_304,
                "kv_budget_formula": "1 x 79.65 GiB x 0.9",
                "max_concurrency": {"8192": 54, "131072": 3},
                "binds": {"8192": "kv_memory", "131072": "max_num_seqs"},
            }
        ],
        "picks": [
            {
                "gpu": "L4",
                "num_gpus": 2,
                "memory_bytes": 2**35,
                "kv_budget_bytes": 2**34,
                "held": 9,
                "price": 1.5,
                "price_per_sequence": 0.17,
            }
        ],
        "tiers": [
            {
                "name": "host",
                "size_bytes": 2**38,
                "bandwidth": 25e9,
                "bandwidth_basis": "assumed",
                "loads": [
                    {
                        "context": 8192,
                        "stored_bytes": 2**30,
                        "sequences": 256,
                        "load_s": 0.043,
                        "recompute_s": 1.64,
                        "faster": "load",
                    }
                ],
            }
        ],
        "prefill_basis": "5,000 tokens/s, as given",
        "findings": [
            {"severity": "note", "message": "harmless"},
            {"severity": "warning", "message": HOSTILE},
        ],
        "assumptions": [HOSTILE],
        "explain": [f"growth = {HOSTILE}"],
        "trace": {
            "path": "/traces/mooncake.jsonl.gz",
            "kv_budget_bytes": 58_760_722_841,
            "lengths": {"num_requests": 12031, "p50": 7255, "p99": 85_858, "max": 126_527},
            "today": holding(),
            "what_ifs": [
                change("cap=27904", 1.49),
                change("route=27904", 1.0, second=True),
                change("codec=int4", 3.77),
            ],
            "reuse": {"engine_hit_rate": 0.373, "unique_bytes": 11_887_629_041_664},
            "levels": [{"name": "KV budget", "size_bytes": 58_760_722_841, "token_hit_rate": 0.0447}],
            "findings": [],
            "notes": ["format: mooncake"],
            "cache": cache_record(),
            "statistics": statistics(),
        },
    }
