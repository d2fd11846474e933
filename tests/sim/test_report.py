"""What the report says about runs whose figures are known by hand."""

from __future__ import annotations

import json

import pytest
from sim_case import LinearCost, step_clock

from kvtune.sim import ServeTargets, SimRequest, run_report


def burst(count, *, at=0.0, prompt=16, output=4, name="b"):
    return [
        SimRequest(request_id=f"{name}{i}", arrival_s=at, num_prompt_tokens=prompt, num_output_tokens=output)
        for i in range(count)
    ]


def test_the_report_is_one_plain_json_object(simulate):
    cost = step_clock()
    report = run_report(simulate(cost=cost).run(burst(5)), cost, targets=ServeTargets(ttft_s=3.0))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["completed"] == 5
    assert report["cost_model"]["source"] == "test"


def test_goodput_counts_requests_that_met_every_target(simulate):
    # one seat: request i starts when i others have had their four steps
    run = simulate(cost=step_clock(), max_num_seqs=1).run(burst(4))
    report = run_report(run, step_clock(), targets=ServeTargets(ttft_s=5.0))
    assert [record.ttft_s for record in run.records] == [1.0, 5.0, 9.0, 13.0]
    assert report["slo"]["attainment"] == 0.5
    assert report["slo"]["request_goodput"] == 2 / 16
    assert run_report(run, step_clock())["slo"] is None


def test_a_burst_shows_as_the_longest_queue_and_those_inside_it_as_late(simulate):
    calm = [*burst(1, at=0.0, name="first"), *burst(1, at=200.0, name="last")]
    run = simulate(cost=step_clock(), max_num_seqs=1).run([*calm, *burst(10, at=50.0)])
    overload = run_report(run, step_clock())["overload"]
    assert overload["waiting_peak"] == 9
    assert overload["longest_queueing_begin_s"] == 50.0
    assert overload["longest_queueing_s"] == 9 * 4  # until the tenth is admitted
    assert overload["requests_in_longest_queueing"] == 10
    assert overload["p95_ttft_ms_outside"] == 1000.0
    assert overload["p95_ttft_ms_inside"] > 30_000
    assert not overload["is_sustained"]


def test_a_server_that_never_catches_up_is_told_as_sustained_overload(simulate):
    requests = [r for i in range(40) for r in burst(1, at=float(i), name=f"r{i}-")]
    run = simulate(cost=step_clock(), max_num_seqs=1).run(requests)
    assert run_report(run, step_clock())["overload"]["is_sustained"]


def test_the_timeline_accounts_for_every_request_and_token(simulate):
    cost = LinearCost()
    run = simulate(cost=cost).run([*burst(20), *burst(20, at=3.0, name="c", output=9)])
    report = run_report(run, cost)
    timeline = report["timeline"]
    assert sum(timeline["arrivals"]) == sum(timeline["completed"]) == 40
    assert sum(timeline["prefill_tokens_per_s"]) * timeline["bin_s"] == pytest.approx(40 * 16)
    assert sum(timeline["decode_tokens_per_s"]) * timeline["bin_s"] == pytest.approx(20 * 3 + 20 * 8)
    assert report["utilisation"]["busy"] == pytest.approx(run.steps[:, 1].sum() / run.duration_s)
    assert len({len(column) for column in timeline.values() if isinstance(column, list)}) == 1
