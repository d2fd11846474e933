"""What a tier holds and whether loading from it beats computing again."""

from __future__ import annotations

from typing import Any

import pytest

from kvtune.errors import UsageError
from kvtune.plan import Plan, PlanRequest, TierRequest, find_model, plan_model

GIB = 1 << 30


def plan_of(model: str, tier: TierRequest, *, rate: float | None = None, **request: Any) -> Plan:
    return plan_model(find_model(model), PlanRequest(**request), tiers=[tier], prefill_rate=rate)


def test_a_tier_holds_its_bytes_in_whole_sequences_and_in_tokens() -> None:
    (tier,) = plan_of("Llama-3.1-8B", TierRequest(name="host", size=64 * GIB), contexts=(8192,)).tiers
    assert tier.tokens == 64 * GIB // 131_072
    assert tier.loads[0].sequences == 64
    assert (tier.bandwidth, tier.bandwidth_basis) == (25e9, "assumed")


def test_loading_wins_above_the_bandwidth_at_which_both_take_equally_long() -> None:
    def faster(bandwidth: float) -> str | None:
        tier = TierRequest(name="host", size=GIB, bandwidth=bandwidth)
        return plan_of("Llama-3.1-8B", tier, rate=10_000.0, contexts=(8192,)).tiers[0].loads[0].faster

    break_even = 10_000 * 131_072  # bytes per token x tokens per second
    assert faster(break_even * 1.01) == "load"
    assert faster(break_even * 0.99) == "recompute"
    tier = TierRequest(name="host", size=GIB)
    load = plan_of("Llama-3.1-8B", tier, rate=10_000.0, contexts=(8192,)).tiers[0].loads[0]
    assert load.break_even_bandwidth == pytest.approx(break_even)


def test_a_disk_pays_its_latency_once_per_load() -> None:
    disk = TierRequest(name="disk", size=GIB, bandwidth=1e9)
    load = plan_of("Llama-3.1-8B", disk, rate=1e9, contexts=(16,)).tiers[0].loads[0]
    assert load.load_s == pytest.approx(16 * 131_072 / 1e9 + 100e-6)


def test_only_what_later_tokens_see_is_brought_back() -> None:
    tier = TierRequest(name="host", size=GIB)
    load = plan_of("gpt-oss-20b", tier, contexts=(131_072,), engine="vllm").tiers[0].loads[0]
    assert load.stored_bytes == 131_072 * 24_576 + 12 * 128 * 2048


def test_recomputing_costs_two_operations_per_parameter_and_the_attention() -> None:
    plan = plan_of("Llama-3.1-8B", TierRequest(name="host", size=GIB), gpu="h100", contexts=(1000,))
    flops = 2 * 8_030_261_248 * 1000 + 32 * 2 * 32 * (128 + 128) * 1000 * 1001 / 2
    assert plan.tiers[0].loads[0].recompute_s == pytest.approx(flops / (989e12 * 0.5))
    assert "8,030,261,248 parameters" in (plan.prefill_basis or "")


def test_only_the_experts_a_token_meets_are_computed() -> None:
    tier = TierRequest(name="host", size=GIB)
    dense = plan_of("Qwen3-32B", tier, gpu="h100", contexts=(1000,)).tiers[0].loads[0]
    sparse = plan_of("Qwen3-30B-A3B", tier, gpu="h100", contexts=(1000,)).tiers[0].loads[0]
    assert (dense.recompute_s or 0) > 8 * (sparse.recompute_s or 0) > 0


def test_without_a_card_or_a_rate_recomputing_has_no_price() -> None:
    plan = plan_of("Llama-3.1-8B", TierRequest(name="host", size=GIB))
    assert plan.prefill_basis is None
    assert {load.faster for load in plan.tiers[0].loads} == {None}


def test_a_bandwidth_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="bandwidth"):
        TierRequest(name="disk", size=GIB, bandwidth=0.0)
