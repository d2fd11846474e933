"""Forecasts from a trace's first half, against what its second half hit."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from kvtune.cache.forecast import forecast_hit_rate
from kvtune.cache.replay import Replayer
from kvtune.errors import UsageError
from kvtune.workload import Workload, WorkloadRequest, block_trace, first_requests, load_workload


def sessions(seed, num_requests, *, length=lambda share: 6.0):
    """Turns that take up one of the last 60 prompts, or begin anew with one of a few system prompts."""
    rng = np.random.default_rng(seed)
    fresh = itertools.count(10_000)
    prompts = [[0]]
    for at in range(num_requests):
        if rng.random() < 0.5:
            kind = min(int(rng.pareto(1.2)), 30)
            base = [30 * kind + i for i in range(12)]
        else:
            base = prompts[rng.integers(max(0, len(prompts) - 60), len(prompts))][:60]
        prompts.append([*base, *(next(fresh) for _ in range(1 + rng.poisson(length(at / num_requests))))])
    requests = tuple(
        WorkloadRequest(
            request_id=str(i), arrival_s=float(i), input_length=16 * len(ids), hash_ids=tuple(ids)
        )
        for i, ids in enumerate(prompts)
    )
    return block_trace(Workload(requests=requests, format="x", block_size=16))


@pytest.mark.parametrize("share", [0.01, 0.1, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_steady_process_is_forecast_within_one_and_a_half_points(seed, share):
    trace = sessions(seed, 8000)
    capacity = None if share is None else int(share * trace.num_unique)
    found = forecast_hit_rate(trace, capacity)
    assert found.status == "stationary", found.reasons
    assert abs(found.error) <= 0.015
    assert found.low <= found.hit_rate <= found.high
    assert found.num_history == trace.num_requests // 2
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_actual_hit_rate_is_that_of_a_replay_of_the_whole_trace():
    trace = sessions(3, 2000)
    hits = Replayer(trace).replay("lru", 500).outcome.hit_blocks[1000:].sum()
    references = trace.num_references - trace.request_start[1000]
    assert forecast_hit_rate(trace, 500).actual == pytest.approx(hits / references)


def test_the_future_has_no_say_in_the_forecast():
    trace = sessions(4, 3000)
    past = forecast_hit_rate(first_requests(trace, 1500), 400, history=1.0)
    whole = forecast_hit_rate(trace, 400)
    assert (past.hit_rate, past.low, past.high) == (whole.hit_rate, whole.low, whole.high)
    assert past.actual is None and past.error is None


def test_a_history_that_drifts_gives_reasons_in_place_of_a_number():
    found = forecast_hit_rate(sessions(5, 6000, length=lambda share: 2 + 40 * share), 1000)
    assert found.status == "drifting"
    assert found.hit_rate is None and found.error is None
    assert "prompt length" in found.reasons[0]
    assert 0 < found.history_hit_rate < 1


def test_a_short_history_gives_no_number():
    found = forecast_hit_rate(sessions(6, 200), 100)
    assert (found.status, found.hit_rate) == ("too_short", None)


def test_a_share_outside_zero_to_one_is_refused():
    with pytest.raises(UsageError, match="must lie in"):
        forecast_hit_rate(sessions(6, 50), 100, history=0.0)


needs_traces = pytest.mark.skipif(
    "KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES=DIR names the public traces"
)


@pytest.mark.proof
@needs_traces
@pytest.mark.parametrize("capacity", [195, 1000, 5859, 10_000, 18_279, 30_000, 50_000, 100_000, None])
def test_the_mooncake_conversation_is_forecast_within_one_and_a_half_points(capacity):
    trace = block_trace(load_workload(Path(os.environ["KVTUNE_TRACES"]) / "mooncake_conversation.jsonl.gz"))
    found = forecast_hit_rate(trace, capacity)
    assert found.status == "stationary", found.reasons
    assert abs(found.error) <= 0.015


@pytest.mark.proof
@needs_traces
@pytest.mark.parametrize("capacity", [1000, 10_000, None])
def test_the_agent_fleet_is_flagged(capacity):
    path = Path(os.environ["KVTUNE_TRACES"]) / "claude_code_fleet_a.jsonl.gz"
    found = forecast_hit_rate(block_trace(load_workload(path, trace_block_size=512)), capacity)
    assert (found.status, found.hit_rate) == ("drifting", None)
