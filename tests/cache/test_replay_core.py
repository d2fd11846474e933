"""The replay core answers as the textbook does, native and pure Python alike, block for block."""

import dataclasses
import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import replay_models as textbook

from kvtune.cache.replay import DEFAULT_POLICY, Replayer, policy_names
from kvtune.cache.replay_native import NativeCore, library_path
from kvtune.cache.replay_python import PYTHON_POLICIES
from kvtune.errors import HostError, InvariantError, UsageError
from kvtune.workload import block_trace, load_workload

needs_library = pytest.mark.skipif(library_path() is None, reason="the native replay core is not built")
CORES = [pytest.param("native", marks=needs_library), "python"]
BY_ORDER = {"lru": textbook.lru, "lfu": textbook.lfu, "fifo": textbook.fifo}
OFFLINE = {"optimal": textbook.optimal, "optimal_pinned": textbook.optimal_pinned}


def steps_of(result):
    """Per request (blocks hit, blocks that left in order)."""
    bounds = np.cumsum(result.outcome.num_evicted)[:-1]
    gone = [part.tolist() for part in np.split(result.evictions, bounds)]
    return list(zip(result.outcome.hit_blocks.tolist(), gone, strict=True))


def named(steps, number):
    return [(hit, [number[key] for key in gone]) for hit, gone in steps]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("capacity", [1, 2, 4, 9, 30, 1000])
@pytest.mark.parametrize("policy", [*BY_ORDER, *OFFLINE])
def test_every_policy_hits_and_evicts_as_its_textbook_definition_step_by_step(policy, capacity, core):
    for seed in range(4):
        requests = list(textbook.random_requests(seed))
        trace, number = textbook.trace_of(requests)
        result = Replayer(trace, core=core).replay(policy, capacity, keep_log=True)
        if policy in OFFLINE:
            expected = OFFLINE[policy](requests, capacity, number)
        else:
            expected = BY_ORDER[policy](requests, capacity)
        assert steps_of(result) == named(expected, number)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("seed", range(12))
def test_no_rule_serves_more_hits_than_the_optima(seed, core):
    requests = list(textbook.random_requests(seed, count=9, deepest=3))
    trace, _ = textbook.trace_of(requests)
    for capacity in (1, 2, 3, 4):
        replayer = Replayer(trace, core=core)
        best = textbook.most_hits(requests, capacity, is_pinned=False)
        assert replayer.replay("optimal", capacity).blocks_hit == best
        best_pinned = textbook.most_hits(requests, capacity, is_pinned=True)
        assert replayer.replay("optimal_pinned", capacity).blocks_hit == best_pinned


@needs_library
def test_the_native_core_and_its_twin_know_the_same_policies():
    path = library_path()
    assert path is not None
    assert sorted(NativeCore(path).policies) == sorted(policy_names())
    assert DEFAULT_POLICY in policy_names()


@needs_library
@pytest.mark.parametrize("full_blocks_only", [False, True])
@pytest.mark.parametrize("policy", policy_names())
def test_both_cores_agree_step_by_step_on_longer_traces(policy, full_blocks_only):
    requests = list(textbook.random_requests(7, count=1500, branches=3, deepest=9))
    trace, _ = textbook.trace_of(requests)
    for capacity in (3, 40, 700, None):
        native, python = (
            Replayer(trace, core=core, full_blocks_only=full_blocks_only).replay(
                policy, capacity, keep_log=True
            )
            for core in ("native", "python")
        )
        assert steps_of(native) == steps_of(python)
        assert native.outcome.hit_tokens.tolist() == python.outcome.hit_tokens.tolist()
        assert native.outcome.is_rejected.tolist() == python.outcome.is_rejected.tolist()


@pytest.mark.parametrize("core", CORES)
def test_the_curve_equals_a_direct_lru_replay_at_every_capacity(core):
    requests = list(textbook.random_requests(3, count=400, branches=3, deepest=7))
    trace, _ = textbook.trace_of(requests)
    replayer = Replayer(trace, core=core)
    curve = replayer.lru_curve()
    for capacity in [*range(1, 60), *range(60, trace.num_unique + 20, 37), None]:
        direct = replayer.replay("lru", capacity)
        assert curve.blocks_hit(capacity) == direct.blocks_hit
        assert curve.token_hit_rate(capacity) == direct.token_hit_rate


@pytest.mark.parametrize("core", CORES)
def test_the_curve_of_later_requests_counts_them_alone_in_a_warm_cache(core):
    requests = list(textbook.random_requests(5, count=300))
    trace, _ = textbook.trace_of(requests)
    replayer = Replayer(trace, core=core)
    curve = replayer.lru_curve(first_counted=150)
    for capacity in (1, 7, 30, None):
        direct = replayer.replay("lru", capacity)
        assert curve.blocks_hit(capacity) == direct.outcome.hit_blocks[150:].sum()
    assert curve.blocks_total == sum(len(request) for request in requests[150:])


@pytest.mark.parametrize("core", CORES)
def test_the_curve_survives_renumbering_its_touches(core):
    """Few blocks touched very often: the times run out many times over."""
    requests = [[("a",), ("a", k % 3)] for k in range(6000)]
    trace, _ = textbook.trace_of(requests)
    replayer = Replayer(trace, core=core)
    curve = replayer.lru_curve()
    assert [curve.blocks_hit(c) for c in range(5)] == [
        0, *(replayer.replay("lru", c).blocks_hit for c in range(1, 5))
    ]  # fmt: skip


def test_the_smallest_capacity_for_given_hits_is_read_off_the_curve():
    requests = list(textbook.random_requests(3, count=400))
    curve = Replayer(textbook.trace_of(requests)[0]).lru_curve()
    capacity = curve.capacity_for(curve.blocks_hit(20))
    assert capacity is not None
    assert curve.blocks_hit(capacity - 1) < curve.blocks_hit(20) <= curve.blocks_hit(capacity)
    assert curve.capacity_for(10**9) is None


@pytest.mark.parametrize("core", CORES)
def test_hit_tokens_weigh_each_block_by_what_it_holds(core):
    requests = [["a", "ab"], ["a", "ab", "abc"], ["a", "ab", "abc"]]
    trace, _ = textbook.trace_of(requests)  # blocks of 16, the last of each request holds 15
    result = Replayer(trace, core=core).replay("lru", None)
    assert result.outcome.hit_tokens.tolist() == [0, 32, 47]
    assert result.tokens_total == 31 + 47 + 47
    assert result.token_hit_rate == pytest.approx(79 / 125)
    assert result.block_hit_rate == pytest.approx(5 / 8)


@pytest.mark.parametrize("core", CORES)
def test_tenants_add_up_to_the_whole(core):
    requests = list(textbook.random_requests(1, count=200))
    tenants = [random.Random(i).choice(["ann", "bob", "eve"]) for i in range(200)]
    trace, _ = textbook.trace_of(requests, tenants=tenants)
    replayer = Replayer(trace, core=core)
    result = replayer.replay("lru", 20)
    rows = replayer.tenants(result)
    assert {row.tenant for row in rows} == {"ann", "bob", "eve"}
    assert sum(row.blocks_hit for row in rows) == result.blocks_hit
    assert sum(row.tokens_total for row in rows) == result.tokens_total
    of_ann = [
        hit for hit, name in zip(result.outcome.hit_blocks.tolist(), tenants, strict=True) if name == "ann"
    ]
    ann = next(row for row in rows if row.tenant == "ann")
    assert (ann.blocks_hit, ann.num_requests) == (sum(of_ann), len(of_ann))


@pytest.mark.parametrize("core", CORES)
def test_an_empty_trace_and_empty_requests_hit_nothing(core):
    for requests in ([], [[], [], []], [[], ["a"], []]):
        trace, _ = textbook.trace_of(requests)
        replayer = Replayer(trace, core=core)
        for policy in policy_names():
            result = replayer.replay(policy, 1)
            assert (result.blocks_hit, result.block_hit_rate) == (0, 0.0)
        assert replayer.lru_curve().blocks_hit(None) == 0


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_ids": np.array([0, 1, 9, 0, 1], dtype=np.int64)}, r"outside 0\.\.num_unique-1"),
        ({"block_ids": np.array([0, 1, -1, 0, 1], dtype=np.int64)}, r"outside 0\.\.num_unique-1"),
        ({"block_ids": np.array([0, 1, 2, 1, 0], dtype=np.int64)}, "request 1: .* whole prefixes"),
        ({"block_ids": np.array([0, 1, 2, 0, 0], dtype=np.int64)}, "request 1: .* whole prefixes"),
        ({"request_start": np.array([0, 4, 3], dtype=np.int64)}, "offsets"),
        ({"request_start": np.array([0, 9, 5], dtype=np.int64)}, "offsets"),
        ({"request_start": np.array([-1, 3, 5], dtype=np.int64)}, "offsets"),
        ({"block_tokens": np.array([16], dtype=np.int32)}, "as many block_tokens"),
        ({"block_ids": np.array([0, 1, 2, 0, 1], dtype=np.int32)}, "block_ids must be one row of int64"),
        ({"block_ids": np.zeros((5, 1), dtype=np.int64)}, "one row"),
        ({"prompt_tokens": np.array([9], dtype=np.int64)}, "2 requests needs as many prompt_tokens"),
        ({"tenant": np.array([0, 1], dtype=np.int32)}, "tenants outside its list of 1"),
        ({"tenant": np.array([0, -1], dtype=np.int32)}, "tenants outside its list of 1"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, reason, core):
    trace, _ = textbook.trace_of([["a", "ab", "abc"], ["a", "ab"]])
    with pytest.raises(UsageError, match=reason):
        Replayer(dataclasses.replace(trace, **change), core=core)


@pytest.mark.parametrize("core", CORES)
def test_what_cannot_be_replayed_is_refused_by_name(core):
    replayer = Replayer(textbook.trace_of([["a", "ab"]])[0], core=core)
    with pytest.raises(UsageError, match="unknown eviction policy 'belady'; known: fifo, lru"):
        replayer.replay("belady", 3)
    with pytest.raises(UsageError, match="at least 1 block, found 0"):
        replayer.replay("lru", 0)
    with pytest.raises(UsageError, match="no policy parameter 'alpha'; known here: none"):
        replayer.replay("lru", 3, parameters={"alpha": 1.0})
    with pytest.raises(UsageError, match="auto, native or python, found 'gpu'"):
        Replayer(replayer.trace, core="gpu")


def test_a_library_that_is_missing_or_strange_is_the_hosts_problem(tmp_path, monkeypatch):
    trace, _ = textbook.trace_of([["a"]])
    strange = tmp_path / "libkvtune_replay.so"
    strange.write_bytes(b"not a library")
    with pytest.raises(HostError, match="does not load"):
        NativeCore(strange)
    monkeypatch.setattr("kvtune.cache.replay.library_path", lambda: None)
    with pytest.raises(HostError, match="reinstall kvtune with a C\\+\\+ compiler"):
        Replayer(trace, core="native")
    assert Replayer(trace).core == "python"


def test_progress_covers_the_whole_trace_and_never_runs_back():
    seen = []
    trace, _ = textbook.trace_of(list(textbook.random_requests(1, count=500)))
    Replayer(trace).replay("lru", 10, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (trace.num_references, trace.num_references)
    assert len(seen) > 50


def test_a_policy_that_names_no_victim_is_a_bug_that_is_told(monkeypatch):
    class Stubborn(PYTHON_POLICIES["lru"].make):  # pyright: ignore
        def victim(self):
            return None

    entry = dataclasses.replace(PYTHON_POLICIES["lru"], make=Stubborn)
    monkeypatch.setattr("kvtune.cache.replay_python.PYTHON_POLICIES", {**PYTHON_POLICIES, "lru": entry})
    trace, _ = textbook.trace_of([["a"], ["b"]])
    with pytest.raises(InvariantError, match="names no victim"):
        Replayer(trace, core="python").replay("lru", 1)


def _expected_rows():
    folder = os.environ.get("KVTUNE_TRACES")
    if folder is None:
        return []
    return list(json.loads((Path(folder) / "expected.json").read_text()).items())


@pytest.mark.proof
@pytest.mark.skipif("KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES names the folder of traces")
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("name", "expected"), _expected_rows())
def test_public_traces_replay_to_the_published_block(name, expected, core):
    path = Path(os.environ["KVTUNE_TRACES"]) / name
    trace = block_trace(load_workload(path, trace_block_size=expected["block_size"]))
    assert trace.num_requests == expected["requests"]
    assert trace.num_references == expected["blocks_total"]
    assert trace.num_unique == expected["unique_blocks"]
    replayer = Replayer(trace, core=core)
    curve = replayer.lru_curve()
    assert curve.blocks_hit(None) == expected["infinite_hit_blocks"]
    names = {"opt": "optimal", "opt_pinned": "optimal_pinned"}
    wanted = expected["hit_blocks"].items()
    if core == "python":  # all capacities take minutes
        wanted = [(c, row) for c, row in wanted if c in {"1000", "10000"} and trace.num_references < 10**6]
    for capacity, row in wanted:
        assert curve.blocks_hit(int(capacity)) == row["lru"]
        found = {name: replayer.replay(names.get(name, name), int(capacity)).blocks_hit for name in row}
        assert found == row, f"{capacity} blocks"


@pytest.mark.proof
@pytest.mark.skipif("KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES names the folder of traces")
def test_a_trace_is_read_as_its_publisher_wrote_it():
    """The ids of the fast reader against those of ten lines of Python."""
    path = Path(os.environ["KVTUNE_TRACES"]) / "mooncake_conversation.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    trace, _ = textbook.trace_of(requests)
    assert np.array_equal(trace.block_ids, block_trace(load_workload(path)).block_ids)
