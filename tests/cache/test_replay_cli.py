"""`kvtune simulate --mode cache` from the outside: one JSON object, readable tables, one line for errors."""

import json
import subprocess
import sys

import pytest

from kvtune.cache.replay import DEFAULT_POLICY
from kvtune.cli.main import main
from kvtune.cli.progress import TimeLeft
from kvtune.workload import Workload, WorkloadRequest, write_workload


@pytest.fixture
def trace(tmp_path):
    """Two conversations of five turns that take turns, and a passer-by; blocks of 512 tokens."""
    requests, next_id = [], iter(range(1000))

    def ask(turn, chain, **tags):
        requests.append(
            WorkloadRequest(
                request_id=str(len(requests)),
                arrival_s=float(turn),
                hash_ids=tuple(chain),
                input_length=512 * len(chain) - 7,
                tags=tags,
            )
        )

    ann, bob = [next(next_id)], [next(next_id)]
    for turn in range(5):
        for name, chain in (("ann", ann), ("bob", bob)):
            chain += [next(next_id), next(next_id)]
            ask(turn, chain, tenant=name)
        ask(turn, [next(next_id)])
    path = tmp_path / "trace.jsonl"
    write_workload(Workload(requests=tuple(requests), format="test", block_size=512), path)
    return path


@pytest.fixture
def simulate(capsys):
    """Run `kvtune simulate`; returns (exit code, stdout, stderr)."""

    def run(*args):
        code = main(["simulate", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def as_json(simulate, *args):
    code, out, err = simulate(*args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_one_policy_at_one_capacity_answers_the_documented_keys(simulate, trace):
    record = as_json(simulate, trace, "--mode", "cache", "--policy", "lru", "--capacity-blocks", 40)
    assert record["num_requests"] == 15
    assert record["blocks_total"] == 2 * (3 + 5 + 7 + 9 + 11) + 5
    assert record["blocks_hit"] == 2 * (3 + 5 + 7 + 9)
    assert record["block_hit_rate"] == pytest.approx(48 / 75)
    assert record["token_hit_rate"] == pytest.approx(48 * 512 / (75 * 512 - 15 * 7))
    assert (record["policy"], record["capacity_blocks"]) == ("lru", 40)
    assert record["elapsed_s"] >= 0


def test_an_unbounded_cache_is_written_as_a_word(simulate, trace):
    record = as_json(simulate, trace, "--capacity-blocks", "inf")
    assert record["capacity_blocks"] == "inf"
    assert record["blocks_hit"] == 48
    assert record["policy"] == DEFAULT_POLICY


def test_capacities_may_be_blocks_shares_and_memory(simulate, trace):
    args = ("--capacity", "7,50%,1MiB,inf", "--bytes-per-token", 100, "--more", "512000")
    record = as_json(simulate, trace, *args)
    sizes = [row["capacity_blocks"] for row in record["capacities"]]
    assert sizes == [7, round(0.5 * record["unique_blocks"]), 2**20 // 51200, "inf"]
    assert record["block_bytes"] == 51200
    assert record["capacities"][0]["capacity_bytes"] == 7 * 51200


def test_more_memory_and_half_the_bytes_are_what_lru_hits_with_those_blocks(simulate, trace):
    args = ("--capacity", "5,10,15", "--bytes-per-token", 2, "--more", "5KiB", "--policy", "lru")
    record = as_json(simulate, trace, *args)
    five, ten, fifteen = record["capacities"]
    assert record["more_memory"] == {"asked": "5KiB", "blocks": 5}
    half, more = five["what_if"]["half_bytes_per_block"], five["what_if"]["more_memory"]
    assert (
        half["blocks_hit"]
        == more["blocks_hit"]
        == ten["lru"]["blocks_hit"]
        == ten["policies"]["lru"]["blocks_hit"]
    )
    assert ten["what_if"]["more_memory"]["blocks_hit"] == fifteen["lru"]["blocks_hit"]
    assert half["block_hit_rate_gain"] == pytest.approx(
        ten["lru"]["block_hit_rate"] - five["lru"]["block_hit_rate"]
    )


def test_sizes_in_bytes_come_from_a_model(simulate, trace):
    full = as_json(simulate, trace, "--model", "meta-llama/Llama-3.1-8B", "--capacity", "1GiB")
    assert full["block_bytes"] == 512 * 131072
    half = as_json(
        simulate, trace, "--model", "meta-llama/Llama-3.1-8B", "--kv-dtype", "int8", "--capacity", "1GiB"
    )
    assert half["block_bytes"] < 0.52 * full["block_bytes"]
    assert half["capacity_blocks"] > 1.9 * full["capacity_blocks"]


def test_every_capacity_stands_beside_lru_and_the_best_possible(simulate, trace):
    for row in as_json(simulate, trace, "--policy", "all", "--capacity", "3,9,14,20")["capacities"]:
        hits = {name: found["blocks_hit"] for name, found in row["policies"].items()}
        assert row["lru"]["blocks_hit"] == hits["lru"]
        assert row["oracle"]["blocks_hit"] == hits["optimal_pinned"] == max(
            value for name, value in hits.items() if name != "optimal"
        )  # fmt: skip
        assert hits["optimal"] >= hits["optimal_pinned"]
        if hits["optimal_pinned"] > hits["lru"]:
            assert row["policies"]["optimal_pinned"]["gap_closed"] == 1.0
            assert row["policies"]["lru"]["gap_closed"] == 0.0


def test_tenants_are_told_apart(simulate, trace):
    record = as_json(simulate, trace, "--capacity", "inf")
    rows = {row["tenant"]: row for row in record["tenants"]}
    assert rows["ann"]["blocks_hit"] == rows["bob"]["blocks_hit"] == 24
    assert rows[""]["blocks_hit"] == 0
    assert sum(row["num_requests"] for row in rows.values()) == 15


def test_full_blocks_only_leaves_partial_blocks_out_and_refuses_what_cannot_fit(simulate, trace):
    record = as_json(simulate, trace, "--full-blocks-only", "--capacity", "9", "--policy", "lru")
    assert record["blocks_total"] == 75 - 15
    assert record["rejected_requests"] == 2
    assert any("2 requests need more than 9 blocks" in note for note in record["notes"])


def test_another_block_size_is_cut_as_asked_and_said(simulate, trace):
    record = as_json(simulate, trace, "--block-size", "128", "--capacity", "inf")
    assert record["block_size"] == 128
    assert record["is_lower_bound"]
    assert any("lower bounds" in note for note in record["notes"])


def test_the_tables_hold_the_figures_of_the_json(simulate, trace):
    args = (trace, "--policy", "lru,fifo", "--capacity", "9,inf", "--bytes-per-token", "64")
    record = as_json(simulate, *args)
    code, out, _ = simulate(*args)
    assert code == 0
    row = record["capacities"][0]
    for value in (row["lru"], row["oracle"], row["policies"]["fifo"]):
        assert f"{value['block_hit_rate']:.1%}" in out
    assert "288.00 KiB" in out
    assert "32GiB more" in out
    assert "half the bytes per block" in out
    assert max(len(line) for line in out.splitlines()[1:]) <= 120
    assert "ann" in out


def test_the_page_holds_the_record_and_pictures_and_loads_nothing(simulate, trace, tmp_path):
    page = tmp_path / "page.html"
    code, _, err = simulate(trace, "--capacity", "5,9,14", "--html", page)
    assert (code, err) == (0, "")
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "Blocks hit by cache size" in text
    assert "best possible" in text
    assert "<script src" not in text
    code, _, err = simulate(trace, "--html", tmp_path / "nowhere" / "page.html")
    assert code == 2
    assert "create it first" in err


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--policy", "clock"], "unknown eviction policy 'clock'; known: fifo, lru"),
        (["--policy", ","], "unknown eviction policy ','"),
        (["--capacity", "0"], "at least 1 block"),
        (["--capacity", "-3"], "found '-3'"),
        (["--capacity", ","], "at least one size"),
        (["--capacity", "nan"], "found 'nan'"),
        (["--capacity", "9" * 30], "no astronomical number"),
        (["--capacity", "32GiB"], "only with --model or --bytes-per-token"),
        (["--bytes-per-token", "0"], "at least 1, found 0"),
        (["--bytes-per-token", "5", "--model", "x"], "twice"),
        (["--kv-dtype", "int8"], "needs --model"),
        (["--block-size", "0"], "at least 1 token, found 0"),
        (["--mode", "gpu"], "unknown --mode 'gpu'; known: cache, serve"),
        (["--mode", "cache", "--recipe", "r.json"], "--recipe belongs to --mode serve, not to --mode cache"),
        (["--mode", "serve", "--policy", "lru"], "--policy belongs to --mode cache, not to --mode serve"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
    ],
)
def test_what_cannot_be_simulated_is_one_line_and_exit_2(args, problem, simulate, trace):
    code, out, err = simulate(trace, *args)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert problem in err
    code, out, _ = simulate(trace, *args, "--json")
    assert json.loads(out)["error"]["exit_code"] == code == 2


def test_without_a_trace_or_with_lengths_alone_it_says_what_is_missing(simulate, tmp_path):
    code, _, err = simulate()
    assert code == 2
    assert "needs a request file or trace" in err
    path = tmp_path / "lengths.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:01:51.16,374,44\n")
    code, _, err = simulate(path)
    assert code == 2
    assert "lengths only" in err


def test_it_starts_without_loading_what_it_does_not_need(trace):
    code = (
        "import sys; from kvtune.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'rich', 'numpy.ma', 'kvtune.sim') if m in sys.modules])"
    )
    args = [sys.executable, "-c", code, "simulate", str(trace), "--capacity", "9"]
    result = subprocess.run(args, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_progress_is_silent_for_two_seconds_then_tells_the_time_left(capsys):
    now = [0.0]
    with TimeLeft(clock=lambda: now[0]) as progress:
        for now[0], share in ((1.0, 0.1), (1.9, 0.19), (2.5, 0.25), (3.0, 0.3), (20.0, 0.5)):
            progress(share, "lru, 10 blocks")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [" 25%  0:08 left  lru, 10 blocks", " 50%  0:20 left  lru, 10 blocks"]
