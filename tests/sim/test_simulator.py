"""The simulation's loop: times that can be worked out by hand, and many steps at once equal to one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sim_case import LinearCost, random_requests, step_clock

from kvtune.errors import UsageError
from kvtune.sched.shape import SHAPE_COLUMNS
from kvtune.sim import STEP_COLUMNS, SimRequest


def request(name="a", arrival=0.0, prompt=20, output=3, **kwargs):
    return SimRequest(
        request_id=name, arrival_s=arrival, num_prompt_tokens=prompt, num_output_tokens=output, **kwargs
    )


def column(run, name):
    return run.steps[:, STEP_COLUMNS.index(name)]


def test_a_lone_request_takes_its_prefill_and_one_step_for_each_further_token(simulate):
    run = simulate(cost=LinearCost(fixed=0.01, per_row=0.001)).run(
        [request(arrival=5.0, prompt=20, output=3)]
    )
    (record,) = run.records
    assert record.ttft_s == pytest.approx(0.01 + 20 * 0.001)
    assert record.tpot_s == pytest.approx(0.011)
    assert record.e2e_s == pytest.approx(0.03 + 2 * 0.011)
    assert run.duration_s == pytest.approx(5.0 + record.e2e_s)
    assert column(run, "tokens").tolist() == [20, 1, 1]


def test_a_prompt_longer_than_the_token_budget_takes_several_steps(simulate):
    run = simulate(cost=step_clock(), max_num_batched_tokens=16).run([request(prompt=40, output=1)])
    assert column(run, "tokens").tolist() == [16, 16, 8]
    assert run.records[0].ttft_s == 3.0


def test_a_request_that_arrives_during_a_step_waits_for_its_end(simulate):
    run = simulate(cost=step_clock()).run([request("a", 0.0, output=4), request("b", 0.5, output=1)])
    by_name = {record.request_id: record for record in run.records}
    assert by_name["b"].ttft_s == 1.5  # half a step until the next begins, and that step
    assert sorted(run.queue_s.tolist()) == [0.0, 0.5]


def test_taking_a_request_in_costs_time(simulate):
    run = simulate(cost=LinearCost(fixed=1.0, per_row=0.0, submission=0.25)).run([request(output=1)])
    assert run.records[0].ttft_s == 1.25
    assert run.busy_s == 1.25


def test_equal_block_names_are_hits_and_others_are_not(simulate):
    names = np.array([7, 8, 9])
    other = np.array([7, 8, 10])
    run = simulate().run(
        [
            request("a", 0.0, prompt=50, block_names=names),
            request("b", 9.0, prompt=50, block_names=other),
            request("c", 18.0, prompt=50),
        ]
    )
    assert [record.cached_tokens for record in run.records] == [0, 32, 0]


def test_a_request_too_long_for_the_server_is_recorded_as_failed(simulate):
    run = simulate(max_model_len=64).run([request("long", prompt=64), request("short", prompt=8)])
    errors = {record.request_id: record.error for record in run.records}
    assert errors["short"] is None
    assert "64 prompt tokens" in errors["long"]


def test_a_simulation_runs_once(simulate):
    simulation = simulate()
    simulation.run([request()])
    with pytest.raises(UsageError, match="runs once"):
        simulation.run([request()])


def outcome(run):
    """Everything a run tells but what happens between the ends of a stretch of decode steps."""
    exact = [c for c in range(len(STEP_COLUMNS)) if STEP_COLUMNS[c] not in ("referenced", "idle")]
    records = [
        (r.request_id, r.ttft_s, r.e2e_s, r.cached_tokens, r.output_tokens, list(r.itl_s))
        for r in run.records
    ]
    return records, run.steps[:, exact].tolist(), run.cache, run.scheduler, run.queue_s.tolist()


CASES = [
    ("llama", "512KiB", 16, {}),
    ("llama", "96KiB", 16, {"max_num_seqs": 4}),
    ("llama", "48KiB", 16, {"max_num_seqs": 16, "watermark": 0.0}),
    ("gemma2", "512KiB", 16, {}),
    ("gemma2", "128KiB", 16, {"reserved": 0.1}),
]


@pytest.mark.parametrize(("model", "budget", "block_size", "settings"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_decode_steps_made_at_once_equal_steps_made_one_by_one(
    simulate, model, budget, block_size, settings, seed
):
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, 60, rate=[2.0, 8.0, 30.0, 1000.0][seed])
    cache = {"kv_budget": budget, "block_size": block_size}
    fast = simulate(model, cache=cache, **settings)
    slow = simulate(model, cache=cache, **settings)
    steps: list[int] = []
    slow.on_step = lambda output: steps.append(output.step)
    expected = slow.run(requests)
    found = fast.run(requests)
    assert outcome(found) == outcome(expected)
    assert len(steps) == len(expected.steps)
    fast.manager.check()
    slow.manager.check()
    assert [u.free for u in fast.manager.usage()] == [u.free for u in slow.manager.usage()]


class ColumnCost(LinearCost):
    """Time by one column of a step's shape."""

    def __init__(self, column, slope):
        super().__init__()
        self.at, self.slope = SHAPE_COLUMNS.index(column), slope

    def seconds(self, shapes):
        return 1e-6 + self.slope * shapes[:, self.at]

    def step_s(self, row):
        return 1e-6 + self.slope * row[self.at]


def bytes_cost():
    return ColumnCost("distinct_bytes", 1e-9)


def test_a_prefix_that_running_requests_share_is_read_once_in_steps_made_at_once_too(simulate):
    prompt = np.arange(3, 83, dtype=np.int32)  # five blocks, four of them full before its last token
    shared = [request(f"r{i}", 0.0, prompt=80, output=20, prompt_token_ids=prompt) for i in range(4)]
    own = [request(f"r{i}", 0.0, prompt=80, output=20) for i in range(4)]
    fast, slow = simulate(cost=bytes_cost()), simulate(cost=bytes_cost())
    slow.on_step = lambda output: None
    run = fast.run(shared)
    assert outcome(run) == outcome(slow.run(shared))
    assert run.duration_s < 0.6 * simulate(cost=bytes_cost()).run(own).duration_s


def test_steps_after_a_prefill_are_told_from_later_ones_in_steps_made_at_once_too(simulate):
    requests = [request(f"r{i}", 0.01 * i, prompt=40, output=30) for i in range(12)]
    fast, slow = (simulate(cost=ColumnCost("after_prefill", 1e-3)) for _ in range(2))
    slow.on_step = lambda output: None
    run = fast.run(requests)
    assert outcome(run) == outcome(slow.run(requests))
    seconds = run.steps[:, 1]
    assert len(np.unique(np.round(seconds, 9))) > 10  # 1/1, 1/2, 1/3 ... behind each prefill
    assert seconds.max() == pytest.approx(1e-6 + 1e-3)  # the first decode
