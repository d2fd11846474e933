"""The benchmark harness keeps no number a busy machine could have spoilt."""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import harness

QUIET = harness.Probe(load_average=0.1, cpu_share=1.0, meeting_us=None, stalled_share=0.0)
BUSY = harness.Probe(load_average=4.0, cpu_share=0.4, meeting_us=None, stalled_share=0.0)
LIMIT = harness.Limit(read_gb_per_s=10.0, product_gflop_per_s=100.0)


def probes(monkeypatch, *found):
    left = iter(found)
    monkeypatch.setattr(harness, "probe", lambda _: next(left))


def recorder(tmp_path, *flags):
    parser = ArgumentParser()
    harness.add_arguments(parser)
    return harness.Recorder("test", parser.parse_args([*flags, "--json", str(tmp_path / "r.json")]), "none")


def record(tmp_path, *flags):
    calls = {"ours": lambda: None, "peer": lambda: sum(range(20000))}
    found = recorder(tmp_path, *flags)
    found.cell({"size": 1}, calls, dict.fromkeys(calls, (1e6, 1e6)), ["peer"], 1, LIMIT)
    found.finish()
    return json.loads((tmp_path / "r.json").read_text())


def test_a_cell_between_noisy_probes_is_measured_again(monkeypatch, tmp_path):
    probes(monkeypatch, QUIET, BUSY, BUSY, QUIET, QUIET, QUIET)
    result = record(tmp_path)
    assert [cell["attempts"] for cell in result["cells"]] == [3]
    assert result["dropped"] == []
    assert result["cells"][0]["ms"]["ours"]["speedup"] > 1


def test_a_cell_that_stays_noisy_is_dropped_without_a_figure(monkeypatch, tmp_path):
    probes(monkeypatch, *[BUSY] * 6)
    result = record(tmp_path)
    assert result["cells"] == []
    assert "ms" not in result["dropped"][0]
    assert result["dropped"][0]["probes"][0]["cpu_share"] == 0.4


def test_noisy_figures_are_kept_only_when_asked_for_and_marked(monkeypatch, tmp_path):
    probes(monkeypatch, BUSY, QUIET)
    result = record(tmp_path, "--keep-noisy", "--attempts", "1")
    assert [cell["is_quiet"] for cell in result["cells"]] == [False]


def test_every_round_runs_every_call_and_another_one_first():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = harness.measure(calls, 3, lambda: float(len(order)))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


def test_several_threads_are_judged_by_how_long_they_wait_for_each_other():
    assert harness.Probe(8.0, 0.2, 12.0, 0.01).is_quiet
    assert not harness.Probe(0.0, 1.0, 12.0, 0.2).is_quiet
    assert harness.probe(1).meeting_us is None
    assert harness.probe(2).meeting_us > 0


@pytest.mark.parametrize(("num_bytes", "flop", "seconds"), [(1e9, 1e9, 0.1), (1e9, 1e11, 1.0)])
def test_the_limit_is_the_scarcer_of_bytes_and_products(num_bytes, flop, seconds):
    assert pytest.approx(seconds) == LIMIT.seconds(num_bytes, flop)


ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order.get("die"):
        sys.exit("it had enough")
    print(json.dumps({"seconds": 7.0, **order}), flush=True)
"""


def test_a_call_answered_by_another_process_counts_by_the_seconds_of_that_process():
    with harness.Elsewhere("echo", [sys.executable, "-c", ECHO], 1) as child:
        assert child.ask(word="x") == {"seconds": 7.0, "word": "x"}
        calls = {"there": child.ask, "here": lambda: None}
        assert harness.measure(calls, 2, lambda: 0.0) == {"there": [7.0, 7.0], "here": [0.0, 0.0]}
    assert child._process.returncode == 0


def test_a_process_that_dies_is_named_with_what_it_said_last():
    with (
        harness.Elsewhere("echo", [sys.executable, "-c", ECHO], 1) as child,
        pytest.raises(SystemExit, match=r"echo ended:\nit had enough"),
    ):
        child.ask(die=True)
    with pytest.raises(SystemExit, match="no_such_module"):
        harness.Elsewhere("echo", [sys.executable, "-c", "import no_such_module"], 1)
