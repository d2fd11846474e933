"""What changes would win on a trace: shares and capacities that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.plan import (
    Change,
    PlanRequest,
    TierRequest,
    TracePlan,
    WhatIf,
    changes_from_text,
    find_model,
    plan_trace,
    size_model,
)
from kvtune.workload import Workload, WorkloadRequest, load_workload

TOKEN = 131_072
"""Bytes per token of Llama-3.1-8B in bf16."""


def workload(*lengths: int, output: int | None = 0, **fields: Any) -> Workload:
    requests = tuple(
        WorkloadRequest(request_id=str(i), input_length=n, output_length=output, **fields)
        for i, n in enumerate(lengths)
    )
    return Workload(requests=requests, format="test")


def plan_of(
    trace: Workload, changes: str | None = None, *, model: str = "Llama-3.1-8B", budget: int | None = None,
    tiers: tuple[TierRequest, ...] = (), **request: Any,
) -> TracePlan:  # fmt: skip
    asked = PlanRequest(**request)
    chosen = None if changes is None else changes_from_text(changes)
    sizing = size_model(find_model(model), asked)
    return plan_trace(trace, sizing, asked, budget=budget, changes=chosen, tiers=tiers)


def only(trace: Workload, change: str, **options: Any) -> WhatIf:
    (row,) = plan_of(trace, change, **options).what_ifs
    return row


MIXED = workload(160, 160, 160, 1600)


def test_today_is_the_mean_and_the_longest_request() -> None:
    today = plan_of(MIXED, "cap=1600", budget=TOKEN * 3200).today
    assert today.mean_bytes == TOKEN * 520
    assert (today.longest_tokens, today.longest_bytes) == (1600, TOKEN * 1600)
    assert today.expected == pytest.approx(3200 / 520)
    assert today.guaranteed == 2


def test_lengths_are_prompt_and_output_together() -> None:
    plan = plan_of(workload(100, 200, output=60), "cap=1600")
    assert (plan.lengths.mean, plan.lengths.max) == (210, 260)


def test_capping_refuses_the_long_ones_and_holds_more_of_the_rest() -> None:
    row = only(MIXED, "cap=160", budget=TOKEN * 3200)
    assert (row.touched_share, row.lost_tokens_share) == (0.25, pytest.approx(1600 / 2080))
    assert row.gain_expected == pytest.approx(520 / 160)
    assert row.gain_guaranteed == 10
    assert (row.main.num_requests, row.main.guaranteed) == (3, 20)


def test_truncating_keeps_every_request_and_loses_only_what_is_cut() -> None:
    row = only(MIXED, "truncate=160")
    assert (row.touched_share, row.lost_tokens_share) == (0.25, pytest.approx(1440 / 2080))
    assert row.main.num_requests == 4
    assert row.gain_expected == pytest.approx(520 / 160)


def test_routing_loses_nothing_and_splits_the_memory_by_bytes() -> None:
    row = only(MIXED, "route=160", budget=TOKEN * 2080)
    assert (row.touched_share, row.lost_tokens_share, row.gain_expected) == (0.25, 0.0, 1.0)
    assert row.second is not None
    assert row.second_memory_share == pytest.approx(1600 / 2080)
    assert (row.main.num_requests, row.second.num_requests) == (3, 1)
    assert (row.main.guaranteed, row.second.guaranteed) == (3, 1)
    assert row.gain_guaranteed == pytest.approx((480 / 160 + 1600 / 1600) / (2080 / 1600))


def test_a_smaller_codec_touches_every_request_and_wins_its_ratio() -> None:
    row = only(MIXED, "codec=int8")
    assert row.touched_share == 1.0
    assert row.gain_expected == row.gain_guaranteed == pytest.approx(256 / 130)


def test_a_codec_that_saves_nothing_here_shows_it() -> None:
    short = workload(12, 12, 12)
    row = only(short, "codec=fp8", model="Qwen3.5-27B", engine="vllm", contexts=(512,))
    assert row.gain_expected == 1.0


def test_a_limit_nobody_reaches_changes_nothing() -> None:
    for kind in ("cap", "truncate", "route"):
        row = only(MIXED, f"{kind}=4096")
        assert (row.touched_share, row.lost_tokens_share, row.second) == (0.0, 0.0, None)
        assert row.gain_expected == row.gain_guaranteed == 1.0


def test_a_limit_below_every_request_is_a_usage_error_except_for_truncating() -> None:
    for kind in ("cap", "route"):
        with pytest.raises(UsageError, match="shortest has 160"):
            only(MIXED, f"{kind}=100")
    assert only(MIXED, "truncate=100").touched_share == 1.0


def test_without_asking_the_longest_tenth_and_hundredth_and_all_codecs_are_tried() -> None:
    rng = np.random.default_rng(0)
    trace = workload(*(int(n) for n in rng.lognormal(7, 1, size=500) + 100))
    rows = plan_of(trace, engine="vllm", contexts=(8192,)).what_ifs
    kinds = [row.kind for row in rows]
    assert (kinds.count("cap"), kinds.count("truncate"), kinds.count("route")) == (2, 2, 2)
    assert {row.codec for row in rows if row.codec} == {"fp8", "int8", "int4", "nvfp4"}
    first = next(row for row in rows if row.kind == "cap")
    assert 0.05 < first.touched_share <= 0.1
    assert (first.limit or 0) % 256 == 0


def test_requests_of_one_length_leave_only_the_codecs() -> None:
    assert {row.kind for row in plan_of(workload(512, 512)).what_ifs} == {"codec"}


def test_text_counts_four_characters_to_a_token_and_says_so() -> None:
    trace = Workload(
        requests=(WorkloadRequest(request_id="a", prompt="x" * 400, answer="y" * 41),), format="test"
    )
    plan = plan_of(trace, "codec=int8")
    assert plan.lengths.max == 100 + 11
    assert plan.lengths.is_estimated
    assert any("4 characters" in note for note in plan.notes)


def test_requests_without_a_length_are_left_out_and_counted() -> None:
    known = WorkloadRequest(request_id="a", input_length=10)
    unknown = WorkloadRequest(request_id="b", hash_ids=(1, 2))
    plan = plan_of(Workload(requests=(known, unknown), format="test", block_size=16), "codec=int8")
    assert plan.lengths.num_requests == 1
    assert any("left out" in note for note in plan.notes)
    with pytest.raises(UsageError, match="no request states the length"):
        plan_of(Workload(requests=(unknown,), format="test", block_size=16))


def shared_prefix_trace() -> Workload:
    """Four prompts of 640 tokens: 320 shared, 320 of their own."""
    prompts = [tuple(range(320)) + tuple(range(1000 * i, 1000 * i + 320)) for i in range(1, 5)]
    requests = tuple(
        WorkloadRequest(request_id=str(i), token_ids=ids, output_length=1) for i, ids in enumerate(prompts)
    )
    return Workload(requests=requests, format="test")


def test_reuse_is_counted_in_whole_blocks_and_in_the_engines() -> None:
    plan = plan_of(shared_prefix_trace(), model="Qwen3.5-27B", engine="vllm", contexts=(8192,))
    assert plan.reuse is not None
    assert plan.reuse.hit_rate == pytest.approx(3 * 320 / 2560)
    assert (plan.reuse.engine_block_size, plan.reuse.engine_hit_rate) == (784, 0.0)
    assert [finding.code for finding in plan.findings] == ["prefix-cache-loses-hits"]
    assert plan.reuse.unique_tokens == 320 + 4 * 320


def test_an_engine_with_small_blocks_loses_no_hits() -> None:
    plan = plan_of(shared_prefix_trace(), tiers=(TierRequest(name="host", size=TOKEN * 800),))
    assert plan.reuse is not None
    assert plan.reuse.engine_hit_rate == plan.reuse.hit_rate
    assert plan.findings == ()
    assert plan.reuse.unique_bytes == 1600 * TOKEN


def test_a_cache_level_hits_what_lru_hits_in_its_blocks() -> None:
    """Two prompts of 20 blocks take turns: a cache of 40 blocks hits all but the first two, one of 20 the
    shared half alone."""
    shared, own = tuple(range(160)), [tuple(range(1000 * i, 1000 * i + 160)) for i in (1, 2)]
    requests = tuple(
        WorkloadRequest(request_id=str(i), token_ids=shared + own[i % 2], output_length=1) for i in range(6)
    )
    host = TierRequest(name="host", size=TOKEN * 16 * 10)
    plan = plan_of(
        Workload(requests=requests, format="test"), "codec=int4", budget=TOKEN * 16 * 20, tiers=(host,)
    )
    budget, with_host = plan.levels
    assert (budget.name, budget.token_hit_rate) == ("KV budget", pytest.approx(5 * 160 / 1920))
    assert (with_host.size_bytes, with_host.token_hit_rate) == (
        TOKEN * 16 * 30,
        pytest.approx((5 * 160 + 4 * 160) / 1920),
    )
    assert plan.what_ifs[0].hit_rate == with_host.token_hit_rate  # a quarter of the bytes per block
    assert plan.hit_curve[-1][1] == with_host.token_hit_rate
    sizes = [size for size, _ in plan.hit_curve]
    assert sizes == sorted(set(sizes))


def test_a_trace_of_lengths_alone_says_nothing_of_reuse() -> None:
    assert plan_of(MIXED).reuse is None


def test_a_whole_result_is_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": i, "input_length": 1024, "output_length": 8, "hash_ids": [0, i + 1]} for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = json.loads(
        json.dumps(plan_of(load_workload(path, trace_block_size=512), budget=1 << 30).to_dict())
    )
    assert body["reuse"]["block_size"] == 512
    assert body["what_ifs"][0].keys() >= {"change", "touched_share", "gain_expected", "gain_guaranteed"}


def test_changes_are_read_from_a_list() -> None:
    assert changes_from_text("cap=8192, codec=int8") == (
        Change(kind="cap", limit=8192),
        Change(kind="codec", codec="int8"),
    )


@pytest.mark.parametrize("text", ["", "cap", "cap=", "cap=many", "cap=0", "shrink=8", "codec=", "cap=٣"])
def test_changes_that_cannot_be_read_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--what-if"):
        changes_from_text(text)


def test_a_codec_the_engine_does_not_have_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nvfp4"):
        only(MIXED, "codec=nvfp4")


def test_progress_is_told_in_growing_shares() -> None:
    told: list[float] = []
    request = PlanRequest()
    sizing = size_model(find_model("Llama-3.1-8B"), request)
    plan_trace(shared_prefix_trace(), sizing, request, progress=lambda share, _what: told.append(share))
    assert told == sorted(told)
    assert 0 < told[0] < told[-1] <= 1
