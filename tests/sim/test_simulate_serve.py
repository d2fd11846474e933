"""`kvtune simulate --mode serve` and `--calibrate`, from the command line and by import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvtune import CacheConfig, Engine, SchedulerConfig
from kvtune.cli.main import main
from kvtune.engine.calibrate import calibrate
from kvtune.sched.shape import SHAPE_COLUMNS
from kvtune.sim import FittedCost, load_calibration
from kvtune.testing.models import write_model_folder

LLAMA_8B = "meta-llama/Llama-3.1-8B"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 500 * i, "input_length": 1000, "output_length": 20, "hash_ids": [0, 100 + i]}
        for i in range(30)
    ]
    # two rows that leave 512 tokens as the only block size
    rows += [
        {"timestamp": 20000, "input_length": 512 * 10 + more, "output_length": 20, "hash_ids": ids}
        for more, ids in ((0, [*range(1000, 1010)]), (1, [*range(2000, 2011)]))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict]:
    code = main(["simulate", *args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def ticking():
    """A clock that is read in even steps of 2 ms, so that no test waits for real time."""
    state = {"now": 0.0}

    def read() -> float:
        state["now"] += 0.002
        return state["now"]

    return read


def test_calibration_measures_steps_of_many_shapes_and_leaves_the_engine_as_it_was(folder: Path) -> None:
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    with Engine.from_pretrained(folder, cache=CacheConfig(kv_budget="8MiB"), scheduler=scheduler) as engine:
        found = calibrate(engine, seconds=8.0, clock=ticking())
        assert engine.scheduler_config == scheduler
        assert engine.on_step is None
        assert not engine.has_unfinished
        assert engine.stats().blocks[0].free == engine.stats().blocks[0].total
    columns = dict(zip(SHAPE_COLUMNS, zip(*found.shapes, strict=True), strict=True))
    assert len(found.shapes) == len(found.seconds) > 300
    assert max(columns["num_decodes"]) > 2
    assert max(columns["prefill_tokens"]) > 16
    assert found.facts["block_size"] == 16
    assert found.facts["hardware"]["num_cpus"] >= 1


def test_rounds_that_are_counted_make_the_same_steps_every_time(folder: Path) -> None:
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    with Engine.from_pretrained(folder, cache=CacheConfig(kv_budget="1MiB"), scheduler=scheduler) as engine:
        one, again, other = (calibrate(engine, num_rounds=12, seed=seed) for seed in (3, 3, 4))
    assert one.shapes == again.shapes
    assert one.shapes != other.shapes
    assert len(one.shapes) == 12 * 24


def test_a_calibration_made_by_the_command_drives_a_simulation(
    folder: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = tmp_path / "c.json"
    code, facts = run_json(capsys, "--calibrate", str(folder), "--seconds", "6", "--out", str(measured))
    assert code == 0
    assert facts["source"] == "fitted"
    assert isinstance(load_calibration(measured), FittedCost)
    code, result = run_json(
        capsys, str(trace), "--mode", "serve", "--model", str(folder), "--calibration", str(measured),
        "--max-tokens", "4",
    )  # fmt: skip
    assert code == 2  # prompts of 1,000 tokens, a model of 512
    assert "none of the 32 requests can be served" in result["error"]["message"]


def test_a_card_named_on_the_command_line_gives_a_roofline_and_its_own_budget(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "run.json"
    code, result = run_json(
        capsys, str(trace), "--mode", "serve", "--model", LLAMA_8B, "--gpu", "H100-80GB",
        "--slo", "ttft_p95=2s,tpot_p95=50ms", "--save", str(saved), "--html", str(tmp_path / "run.html"),
    )  # fmt: skip
    assert code == 0
    assert result["cost_model"]["source"] == "roofline"
    assert any("not measured" in note for note in result["notes"])
    assert result["completed"] == 32
    assert result["hits_by_tier"]["device"] == 29 * 512
    assert result["slo"]["attainment"] == 1.0
    assert result["server"]["num_blocks"] * 16 * 131072 > 40 * 2**30  # Llama-3.1-8B: 128 KiB a token
    assert len(json.loads(saved.read_text())["ttfts"]) == 32
    assert "Course of the run" in (tmp_path / "run.html").read_text()


def test_a_faster_trace_makes_requests_wait(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (str(trace), "--model", LLAMA_8B, "--gpu", "H100-80GB", "--max-num-seqs", "2")
    _, calm = run_json(capsys, *args)
    _, rushed = run_json(capsys, *args, "--rate-factor", "200")
    assert rushed["mean_queue_ms"] > 20 * calm["mean_queue_ms"]
    assert rushed["overload"]["waiting_peak"] == 30  # two run


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to simulate"),
        (("TRACE",), "whose server?"),
        (("TRACE", "--model", LLAMA_8B), "no step times: no --gpu is named"),
        (("TRACE", "--model", LLAMA_8B, "--gpu", "T4-16GB"), "T4"),
        (("TRACE", "--model", LLAMA_8B, "--gpu", "H100-80GB", "--calibration", "x"), "give one"),
        (("TRACE", "--model", LLAMA_8B, "--gpu", "H100-80GB", "--rate-factor", "0"), "rate factor"),
        (("TRACE", "--model", LLAMA_8B, "--gpu", "H100-80GB", "--kv-dtype", "int3"), "int3"),
        (("TRACE", "--model", LLAMA_8B, "--calibration", "/no/such/file"), "make one with --calibrate"),
        (("TRACE", "--model", LLAMA_8B, "--gpu", "H100-80GB", "--html", "/no/dir/x"), "no folder /no/dir"),
        (("--calibrate", "/no/such/model"), "/no/such/model"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    args: tuple[str, ...], message: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [str(trace) if arg == "TRACE" else arg for arg in args]
    code, result = run_json(capsys, "--mode", "serve", *said)
    assert code == 2
    assert message in result["error"]["message"]


def test_options_of_the_other_mode_are_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run_json(capsys, str(trace), "--mode", "cache", "--gpu", "H100-80GB")
    assert code == 2
    assert "--gpu belongs to --mode serve" in result["error"]["message"]
