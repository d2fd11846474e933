"""Reuse, arrivals and stationarity, against counting by hand and against processes of known law."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.workload import Workload, WorkloadRequest, block_trace, first_requests, stationarity
from kvtune.workload.arrivals import arrival_statistics
from kvtune.workload.reuse import previous_reference, reuse_statistics
from kvtune.workload.reuse_law import fit_gap_law


def traced(prompts, *, arrivals=None, sessions=None):
    """Prompts as paths of content ids, 4 tokens each."""
    requests = tuple(
        WorkloadRequest(
            request_id=str(i),
            arrival_s=float(i if arrivals is None else arrivals[i]),
            input_length=4 * len(ids),
            hash_ids=tuple(ids),
            session_id="" if sessions is None else sessions[i],
        )
        for i, ids in enumerate(prompts)
    )
    return block_trace(Workload(requests=requests, format="x", block_size=4))


paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=2, max_size=12)


@given(paths)
def test_gaps_depths_and_popularity_are_those_counted_one_by_one(prompts):
    report = reuse_statistics(traced(prompts))
    uses, gaps, depth_hits = {}, [], {}
    for at, path in enumerate(prompts):
        for depth in range(len(path)):
            prefix = tuple(path[: depth + 1])
            if prefix in uses:
                gaps.append(at - uses[prefix][-1])
                depth_hits[depth] = depth_hits.get(depth, 0) + 1
            uses.setdefault(prefix, []).append(at)
    assert report["hit_blocks"] == len(gaps)
    if gaps:
        assert report["gaps"]["requests"]["p50"] == pytest.approx(np.percentile(gaps, 50))
        assert report["gaps"]["requests"]["n"] == len(gaps)
    assert report["popularity"]["never_reused_share"] == sum(len(u) == 1 for u in uses.values()) / len(uses)
    for row in report["depth"]:
        inside = range(row["from_block"], row["to_block"])
        assert row["hit_rate"] * row["references"] == pytest.approx(sum(depth_hits.get(d, 0) for d in inside))


@given(st.lists(st.integers(0, 5), max_size=30))
def test_the_previous_reference_is_the_last_one_to_the_same_block(ids):
    found = previous_reference(np.asarray(ids, dtype=np.int64)).tolist()
    assert found == [max((j for j in range(i) if ids[j] == ids[i]), default=-1) for i in range(len(ids))]


def test_reuse_within_a_time_counts_waits_that_the_end_of_the_trace_cuts_off_as_unfinished():
    # One block used at 0, 5 and 10 s: every wait that could be seen to its end was 5 s.
    report = reuse_statistics(traced([[1], [1], [1]], arrivals=[0, 5, 10]))
    assert report["reused_within_s"] == {"1": 0.0, "10": 1.0}
    # Two blocks, of which one is never used again although there was time.
    report = reuse_statistics(traced([[1], [2], [1], [3]], arrivals=[0, 0, 5, 12]))
    assert report["reused_within_s"]["10"] == pytest.approx(1 / 3)


def test_reuse_is_told_apart_by_session():
    trace = traced([[1, 2], [1, 2], [1], [1]], sessions=["a", "a", "b", ""])
    assert reuse_statistics(trace)["sources"] == {"same_session": 0.5, "other_session": 0.25, "unknown": 0.25}
    assert reuse_statistics(traced([[1], [1]]))["sources"] is None


@pytest.mark.parametrize(
    ("law", "draw", "parameters"),
    [
        ("exponential", lambda rng: rng.exponential(40, 6000), {"mean_s": 40}),
        ("weibull", lambda rng: 30 * rng.weibull(0.5, 6000), {"shape": 0.5, "scale_s": 30}),
        ("lognormal", lambda rng: rng.lognormal(3, 1.5, 6000), {"median_s": np.exp(3), "sigma": 1.5}),
        ("lomax", lambda rng: 20 * rng.pareto(1.5, 6000), {"shape": 1.5, "scale_s": 20}),
    ],
)
def test_the_law_gaps_were_drawn_from_is_recognised_with_its_parameters(law, draw, parameters):
    found = fit_gap_law(draw(np.random.default_rng(1)))
    assert found["candidates"][law] < 0.03
    if law != "exponential":  # a Weibull of shape 1 is as good
        assert found["name"] == law
        assert found["parameters"] == pytest.approx(parameters, rel=0.2)
    json.dumps(found, allow_nan=False)


def test_too_few_gaps_have_no_law():
    assert fit_gap_law(np.ones(49)) is None
    assert fit_gap_law(np.zeros(1000)) is None


def arrivals(gaps):
    return np.concatenate([[0.0], np.cumsum(gaps)])


@pytest.mark.parametrize(
    ("kind", "gaps"),
    [
        ("poisson", lambda rng: rng.exponential(0.2, 20_000)),
        ("regular", lambda _: np.full(20_000, 0.2)),
        ("bursty", lambda rng: rng.gamma(0.05, 4, 20_000)),
    ],
)
def test_arrivals_are_named_by_how_their_counts_scatter(kind, gaps):
    report = arrival_statistics(arrivals(gaps(np.random.default_rng(3))))
    assert report["kind"] == kind
    assert report["rate_per_s"] == pytest.approx(5, rel=0.1)
    assert sum(report["timeline"]["counts"]) == 20_001
    assert len(report["timeline"]["counts"]) <= 121


def test_a_coarse_clock_is_recognised_and_does_not_make_arrivals_bursty():
    exact = arrivals(np.random.default_rng(3).exponential(0.2, 20_000))
    report = arrival_statistics(np.floor(exact / 3) * 3)
    assert report["is_clock_coarse"] and report["smallest_gap_s"] == 3
    assert report["cv"] > 3
    assert report["kind"] in ("poisson", "uneven")


def test_a_trace_of_three_arrivals_over_a_year_takes_no_memory_for_its_seconds():
    report = arrival_statistics(np.asarray([0.0, 1.0, 1e12]))
    assert report["dispersion"] == []
    assert arrival_statistics(np.zeros(5)) is None


def conversation(rng, num_requests, *, length=lambda share: 8, is_new=lambda share: 0.3):
    """Each request takes up one of the last 40 prompts and adds to it, or is new."""
    fresh = itertools.count(100)
    recent = [[next(fresh)]]
    for at in range(num_requests):
        share = at / num_requests
        if rng.random() < is_new(share):
            base = []
        else:
            base = recent[rng.integers(max(0, len(recent) - 40), len(recent))][:24]
        recent.append([*base, *(next(fresh) for _ in range(1 + rng.poisson(length(share))))])
        yield recent[-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_steady_process_is_stationary(seed):
    trace = traced(list(conversation(np.random.default_rng(seed), 1500)))
    found = stationarity(trace)
    assert found.verdict == "stationary", found.reasons
    assert found.is_stationary


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"length": lambda share: 4 + 20 * share}, "prompt length"),
        ({"is_new": lambda share: 0.1 if share < 0.6 else 0.9}, "reuse"),
        ({"length": lambda share: 40 if int(share * 6) % 2 else 4}, "prompt length swings"),
    ],
)
def test_growing_prompts_a_change_of_reuse_and_phases_are_drift(change, word):
    found = stationarity(traced(list(conversation(np.random.default_rng(7), 1500, **change))))
    assert found.verdict == "drifting"
    assert any(word in reason for reason in found.reasons)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_load_that_dies_down_is_stated_apart_from_what_is_reused():
    prompts = list(conversation(np.random.default_rng(2), 1500))
    found = stationarity(traced(prompts, arrivals=[1.002**i for i in range(1500)]))
    assert found.verdict == "stationary"
    assert found.load.is_drifting


def test_a_short_trace_is_not_judged():
    assert stationarity(traced([[1]] * 100)).verdict == "too_short"


def test_the_beginning_of_a_trace_is_the_trace_of_the_beginning():
    prompts = list(conversation(np.random.default_rng(5), 60))
    part, alone = first_requests(traced(prompts), 25), traced(prompts[:25])
    assert part.num_unique == alone.num_unique
    for name in (
        "block_ids",
        "request_start",
        "block_tokens",
        "arrival_s",
        "prompt_tokens",
        "tenant",
        "session",
    ):
        assert np.array_equal(getattr(part, name), getattr(alone, name)), name
