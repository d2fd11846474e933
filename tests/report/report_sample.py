"""A result record with every field that the report knows, as `tune` writes it; hostile where strings are."""

from __future__ import annotations

import itertools
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>\"'`|*<!--"


def estimate(value: float, low: float, high: float, n: int = 64) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n, "num_clusters": 16}


def config(k: str, v: str, **more: Any) -> dict[str, Any]:
    return {
        "k_codec": k,
        "v_codec": v,
        "block_size": 16,
        "enable_prefix_caching": True,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        **more,
    }


def metrics(bytes_per_token: float, tpot: float, ttft: float, held: int) -> dict[str, Any]:
    return {
        "kv_bytes_per_token": bytes_per_token,
        "tpot_s": {"n": 64, "mean": tpot, "p50": tpot * 0.97, "p95": tpot * 1.4, "p99": tpot * 1.9},
        "ttft_s": {"n": 64, "mean": ttft, "p50": ttft * 0.8, "p95": ttft * 2.1, "p99": ttft * 2.7},
        "e2e_s": {"n": 64, "mean": tpot * 40, "p50": tpot * 38, "p95": tpot * 60, "p99": tpot * 70},
        "itl_s": {"n": 2048, "mean": tpot, "p50": tpot * 0.9, "p95": tpot * 1.6, "p99": tpot * 3},
        "goodput": 3.21,
        "device_hit_rate": 0.6042,
        "preemptions": 0,
        "recomputed_tokens": 0,
        "output_tokens_per_s": 210.5 / (tpot * 100),
        "requests_held": held,
    }


def quality(verdict: str, kl: float) -> dict[str, Any]:
    def weighed(value: float, floor: float, margin: float) -> dict[str, Any]:
        return {
            "margin": margin,
            "raw": value + floor,
            "floor": floor,
            "verdict": verdict,
            "excess": estimate(value, value * 0.8, value * 1.25),
            "more_requests": 0,
        }

    return {
        "verdict": verdict,
        "reason": f"closest is kl: at most {kl * 1.25:.4g}, margin 0.003",
        "proven": verdict == "PASS",
        "lossless": False,
        "bit_equal": False,
        "margin": {"name": "near-lossless", "kl": 0.003, "flips": 0.025, "delta_nll": 0.005},
        "metrics": {
            "kl": weighed(kl, 1e-5, 0.003),
            "flips": weighed(kl * 9, 2e-4, 0.025),
            "delta_nll": weighed(kl * 0.7, 1e-5, 0.005),
            "decode_kl": weighed(kl * 1.1, 1e-5, 0.003),
        },
        "num_requests": 64,
        "num_clusters": 16,
        "num_tokens": 4096,
        "num_decode_requests": 16,
        "kl_ids": 2048,
        "kl_exact": True,
        "synthetic_text": False,
        "worst_request": {"request_id": HOSTILE, "kl": kl * 6, "flips": 0.03, "case": "long"},
        "strata": [
            {
                "stratum": "case",
                "value": name,
                "num_requests": 16,
                "kl": kl * f,
                "flips": kl * 9,
                "delta_nll": kl,
            }
            for name, f in (("easy", 0.6), ("average", 1.0), ("long context", 1.6), (HOSTILE, 1.1))
        ],
        "notes": [],
        "cannot_see": ["prompts longer than 3,007 tokens, the longest replayed", HOSTILE],
        "probes": {
            "num_questions": 184, "num_contexts": 96, "reference_solved": 161, "lost": 1, "gained": 2,
            "left_out": [],
            "strata": [{"stratum": "task", "value": "recall", "num_questions": 90, "reference_solved": 80,
                        "lost": 1, "gained": 2}],
        },
        "answers": {
            "high_value": True, "checker": "", "num_requests": 1, "net_loss": None, "harm": "", "doubt": "",
            "requests": [{"request_id": "vip", "status": "kept", "baseline_answer": f"yes {HOSTILE}",
                          "candidate_answer": f"yes {HOSTILE}"}],
        },
    }  # fmt: skip


def measured(k: str, v: str, size: float, kl: float, tpot: float) -> dict[str, Any]:
    return {
        "config": config(k, v),
        "metrics": metrics(size, tpot * 0.0101, 0.12, 20),
        "ratios": {"tpot_s.mean": estimate(tpot, tpot * 0.97, tpot * 1.03),
                   "ttft_s.p95": estimate(tpot * 1.1, tpot, tpot * 1.2)},
        "quality": quality("PASS", kl),
        "status": "complete",
        "reason": "",
        "source": "measured for this table",
    }  # fmt: skip


def ablation() -> dict[str, Any]:
    return {
        "winner": {**measured("int8", "int8", 1056.0, 3.1e-4, 1.02), "source": "trial 1 of the search"},
        "variants": [
            {"setting": "k_codec", "value": "int8", "baseline_value": "bf16",
             **measured("bf16", "int8", 1552.0, 1.2e-4, 1.03)},
            {"setting": "v_codec", "value": "int8", "baseline_value": "bf16",
             **measured("int8", "bf16", 1552.0, 2.0e-4, 1.01)},
        ],
        "skipped": ["block_size"],
        "note": "settings interact, so contributions need not add up",
    }  # fmt: skip


def moments(bytes_per_token: int, off: int = 0) -> list[dict[str, Any]]:
    pool, used = 2**30, {"after prefill": 3000, "in decode": 3128}
    names = ("before load", "after load", "after prefill", "in decode", "after the run")
    return [
        {
            "name": name, "num_requests": 4 if name in used else 0, "num_tokens": used.get(name, 0),
            "predicted_allocated_bytes": 0 if name == "before load" else pool,
            "allocated_bytes": 0 if name == "before load" else pool,
            "predicted_used_bytes": used.get(name, 0) * bytes_per_token,
            "used_bytes": used.get(name, 0) * bytes_per_token + (off if name == "in decode" else 0),
            "process_bytes": 700_000_000 + i * 1_000_000,
        }
        for i, name in enumerate(names)
    ]  # fmt: skip


def positions() -> dict[str, Any]:
    def bins(edges: list[int], kl: float) -> list[dict[str, Any]]:
        return [
            {"from": low, "to": high - 1, "num_tokens": 100 + low,
             "kl": estimate(kl * (1 + i), kl, kl * (1.6 + i)), "floor": 1e-6}
            for i, (low, high) in enumerate(itertools.pairwise(edges))
        ]  # fmt: skip

    return {"context": bins([0, 32, 64, 128, 256, 512], 1e-4), "answer": bins([0, 1, 2, 4, 8], 2e-4)}


def answers() -> dict[str, Any]:
    texts = [
        (f"The path is {HOSTILE} joined with care.", f"The road is {HOSTILE} joined with great care."),
        ("same words " * 30, "same words " * 30),
        ('{"a": 1}', "a\u202e\u0000b" + "x" * 900),
    ]
    return {
        "num_requests": 64,
        "num_changed": 2,
        "are_texts": True,
        "json": {"baseline_valid": 3, "still_valid": 2},
        "samples": [
            {"request_id": f"r{i}{HOSTILE}", "strata": {"case": "easy", "language": HOSTILE},
             "kl": 0.01 / (i + 1), "flips": 0.015625, "prompt_tokens": 311 + i,
             "first_change": None if a == b else 3,
             "prompt_end": f"user: what {HOSTILE}?", "baseline": a, "winner": b}
            for i, (a, b) in enumerate(texts)
        ],
    }  # fmt: skip


def sample_result() -> dict[str, Any]:
    """A finished study with a winner, failed and infeasible trials."""
    rows = [
        ("bf16", "bf16", 16, 2048.0, 0.0101, 0.0, "PASS"),
        ("int8", "int8", 16, 1056.0, 0.0103, 3.1e-4, "PASS"),
        ("int8", "bf16", 16, 1552.0, 0.0102, 2.0e-4, "PASS"),
        ("bf16", "int8", 16, 1552.0, 0.0104, 1.2e-4, "PASS"),
        ("int8", "int4", 16, 800.0, 0.0112, 4.4e-3, "UNDECIDED"),
        ("int4", "int8", 16, 800.0, 0.0110, 2.1e-2, "FAIL"),
        ("int4", "int4", 16, 544.0, 0.0108, 0.051, "FAIL"),
        ("int8", "int8", 32, 1060.0, 0.0099, 3.1e-4, "PASS"),
        ("int8", "int8", 64, 1072.0, 0.0098, 3.0e-4, "PASS"),
    ]
    trials: list[dict[str, Any]] = []
    for number, (k, v, block, size, tpot, kl, verdict) in enumerate(rows):
        trials.append(
            {
                "number": number,
                "config": config(k, v, block_size=block),
                "status": "complete",
                "reason": None,
                "metrics": metrics(size, tpot, 0.12, int(40000 / size)),
                "quality": quality(verdict, kl),
            }
        )
    trials.append(
        {
            "number": 9,
            "config": config("bf16", "bf16", max_num_seqs=256),
            "status": "infeasible",
            "reason": f"cache of 4 blocks cannot hold request {HOSTILE}",
            "metrics": None,
        }
    )
    return {
        "schema_version": 1,
        "recipe": "out/recipe.json",
        "kvtune_version": "0.1.0",
        "seed": 7,
        "command": f"kvtune tune --demo --budget 5m --out '{HOSTILE}'",
        "created_at": "2026-11-22T03:00:00Z",
        "next_command": "kvtune emit out/recipe.json --target transformers",
        "identity": {
            "model": {
                "name": f"standin{HOSTILE}",
                "config_sha256": "ab" * 32,
                "path": f"models/standin{HOSTILE}",
                "repo": None,
                "revision": None,
                "weight_dtypes": ["BF16", "F32"],
                "max_model_len": 4096,
            },
            "engine": {"name": "kvtune", "version": "0.1.0", "cuda": "none: torch's CPU build"},
            "hardware": {"cpu": "EPYC", "memory_bytes": 24 * 2**30, "gpus": [], "num_cpus": 2},
        },
        "baseline": {
            "config": config("bf16", "bf16"),
            "metrics": metrics(2048.0, 0.0101, 0.12, 19),
            "effective": {"k_codec": "bf16", "v_codec": "bf16"},
        },
        "winner": {
            "config": config("int8", "int8"),
            "metrics": metrics(1056.0, 0.0103, 0.13, 37),
            "trial": 1,
            "is_baseline": False,
            "effective": {
                "k_codec": "int8",
                "v_codec": "int8",
                "kernel": "native",
                "read_contract": "T0",
                "max_num_seqs": 16,
            },
        },
        "gain": {
            "requests_held": {"ratio": 1.9378, "low": 1.937, "high": 1.9385, "significant": True, "n": 320},
            "kv_bytes_per_token": {"ratio": 0.515625, "low": 0.515625, "high": 0.515625, "significant": True},
            "tpot_s.mean": {"ratio": 1.0198, "low": 0.981, "high": 1.061, "significant": False},
            "ttft_s.p95": {"ratio": 1.083, "low": 1.021, "high": 1.142, "significant": True},
            "goodput": {"ratio": 1.41, "low": 1.22, "high": 1.63, "significant": True},
        },
        "quality": quality("PASS", 3.1e-4),
        "aa_noise": {
            "tpot_s.mean": {"ratio": 1.003, "low": 0.97, "high": 1.04, "significant": False},
            "kl_floor": 1e-5,
        },
        "held": {
            "kv_budget_bytes": 2**30,
            "baseline": {"value": 19.3, "low": 18.2, "high": 20.6, "n": 320, "num_clusters": 90},
            "winner": {"value": 37.4, "low": 35.3, "high": 39.9, "n": 320, "num_clusters": 90},
        },
        "within_slo": {
            "slo": {"ttft_s": 0.132, "tpot_s": 0.0111, "is_asked": False, "factor": 1.1},
            "baseline": {"value": 25.5, "low": 19.6, "high": 29.16, "n": 32, "num_runs": 2},
            "winner": {"value": 29.0, "low": 24.1, "high": 31.2, "n": 32, "num_runs": 2},
        },
        "speed_verdict": "PASS",
        "emitted": {
            "target": "transformers",
            "text": f"# {HOSTILE}\nengine = Engine.from_recipe('r.json')\n",
        },
        "ablation": ablation(),
        "importance": [
            {"setting": "k_codec", "num_values": 3, "bytes": 0.51, "kl": 0.72, "tpot": 0.11},
            {"setting": "block_size", "num_values": 3, "bytes": 0.02, "kl": None, "tpot": 0.2},
        ],
        "memory": {
            "num_requests": 4,
            "baseline": {"moments": moments(2048)},
            "winner": {"moments": moments(1056, off=7)},
        },
        "positions": positions(),
        "answers_side_by_side": answers(),
        "rejected": [
            {
                "config": config("int8", "int4"),
                "reason": f"UNDECIDED: {HOSTILE}",
                "quality": quality("UNDECIDED", 4.4e-3),
            }
        ],
        "context": 2048,
        "stop_reason": "every step of precision was tried",
        "budget_s": 300.0,
        "elapsed_s": 151.25,
        "status": "winner",
        "workload": {
            "path": "demo.jsonl",
            "format": "openai-chat",
            "sha256": "cd" * 32,
            "num_requests": 320,
            "num_rejected": 5,
            "is_synthetic_text": False,
            "prompts_sha256": "ef" * 32,
            "notes": [f"11 of 743 requests rejected {HOSTILE}", "seed 0"],
            "cases": {
                "easy": {"num_requests": 120, "num_rejected": 0},
                "average": {"num_requests": 150, "num_rejected": 0},
                "long_context": {"num_requests": 45, "num_rejected": 0},
                "malformed": {"num_requests": 10, "num_rejected": 5},
                HOSTILE: {"num_requests": 7, "num_rejected": 0},
            },
            "rejected": [{"request_id": f"bad{HOSTILE}", "reason": "empty prompt: input_length is 0"}],
        },
        "trials": trials,
        "smallest_failing_step": {
            "config": config("int4", "int8"),
            "quality": quality("FAIL", 2.1e-2),
            "metrics": {"kv_bytes_per_token": 800.0},
        },
        "limits": ["context up to 4096 tokens", HOSTILE],
        "voided_by": ["another model revision", "another engine version"],
        "fallback": {"trigger": "shadow check fails", "configuration": config("bf16", "bf16")},
    }
