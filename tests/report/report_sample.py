"""A result record with every field that the report knows, as `tune` writes it; hostile where strings are."""

from __future__ import annotations

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
        "goodput": 3.21,
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
    }


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
            "model": {"name": f"standin{HOSTILE}", "config_sha256": "ab" * 32},
            "engine": {"name": "kvtune"},
            "hardware": {"cpu": "EPYC", "memory_bytes": 24 * 2**30},
        },
        "baseline": {"config": config("bf16", "bf16"), "metrics": metrics(2048.0, 0.0101, 0.12, 19)},
        "winner": {
            "config": config("int8", "int8"),
            "metrics": metrics(1056.0, 0.0103, 0.13, 37),
            "trial": 1,
        },
        "gain": {
            "kv_bytes_per_token": {"ratio": 0.515625, "low": 0.515625, "high": 0.515625, "significant": True},
            "tpot_s": {"ratio": 1.0198, "low": 0.981, "high": 1.061, "significant": False},
            "ttft_p95_s": {"ratio": 1.083, "low": 1.021, "high": 1.142, "significant": True},
            "goodput": {"ratio": 1.41, "low": 1.22, "high": 1.63, "significant": True},
        },
        "quality": quality("PASS", 3.1e-4),
        "aa_noise": {"tpot_s": {"ratio": 1.003, "low": 0.97, "high": 1.04, "significant": False}, "kl": 1e-5},
        "held": {"budget_bytes": 64 * 2**20, "baseline": 19, "winner": 37, "fixed": 4},
        "workload": {
            "path": "demo.jsonl",
            "format": "openai-chat",
            "sha256": "cd" * 32,
            "num_requests": 320,
            "num_rejected": 5,
            "is_synthetic_text": False,
        },
        "trials": trials,
        "smallest_failing_step": {
            "config": config("int4", "int8"),
            "quality": quality("FAIL", 2.1e-2),
            "metrics": {"kv_bytes_per_token": 800.0},
        },
        "limits": ["context up to 4096 tokens", HOSTILE],
        "voided_by": ["another model revision", "another engine version"],
        "fallback": {"trigger": "shadow check fails", "configuration": {"k_codec": "bf16"}},
    }
