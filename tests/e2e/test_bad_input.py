"""Bad input gets one clear line, exit 2 or 3, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtune.testing.reference import reference_model_path


def good_line(topic: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": f"What does {topic} do?"}], "max_tokens": 4})


GOOD_LINE = good_line("os.path.join")


def kvtune_command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvtune", *args],
        capture_output=True, text=True, timeout=240, check=False, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("kvtune: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def tune(
    tmp_path: Path, workload: Path, *extra: str, model: str | None = None
) -> subprocess.CompletedProcess[str]:
    args = [
        "tune",
        model or str(reference_model_path()),
        "--workload",
        str(workload),
        "--out",
        str(tmp_path / "out"),
    ]
    return kvtune_command(*args, "--budget", "30s", *extra, cwd=tmp_path)


def good_workload(tmp_path: Path, lines: int = 8) -> Path:
    path = tmp_path / "good.jsonl"
    topics = ("zip", "abs", "json.dumps", "len", "os.path.join", "max", "sorted", "re.match", "iter", "hash")
    path.write_text("".join(good_line(topics[i % len(topics)]) + "\n" for i in range(lines)))
    return path


def test_an_empty_workload_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    assert_refused(tune(tmp_path, path), str(path), "empty")
    assert not (tmp_path / "out").exists()


def test_malformed_json_on_line_7_is_refused_naming_line_7(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text((GOOD_LINE + "\n") * 6 + '{"messages": [\n' + (GOOD_LINE + "\n") * 3)
    assert_refused(tune(tmp_path, path), "line 7")
    assert not (tmp_path / "out").exists()


def test_a_binary_workload_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.jsonl"
    path.write_bytes(bytes(range(256)) * 64)
    assert_refused(tune(tmp_path, path), str(path))
    assert not (tmp_path / "out").exists()


def test_a_missing_workload_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tune(tmp_path, tmp_path / "none.jsonl"), "none.jsonl")


def test_a_file_whose_only_request_is_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "many words here " * 20_000}]}) + "\n"
    )
    assert_refused(tune(tmp_path, path), "1")
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_an_unknown_codec_is_refused_naming_the_known_ones(tmp_path: Path) -> None:
    result = kvtune_command("plan", str(reference_model_path()), "--kv-dtype", "int5", cwd=tmp_path)
    assert_refused(result, "int5", "int8")


def test_a_kv_budget_smaller_than_one_block_is_refused(tmp_path: Path) -> None:
    result = tune(tmp_path, good_workload(tmp_path), "--kv-budget", "1KiB")
    assert_refused(result, "1.00 KiB")
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    result = tune(tmp_path, good_workload(tmp_path), model=str(tmp_path / "no-model"))
    assert_refused(result, "no-model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", [0, -1, 2**40, "eight", True, None])
def test_a_config_with_impossible_heads_is_refused_by_plan_and_tune(tmp_path: Path, heads: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((reference_model_path() / "config.json").read_text())
    config["num_attention_heads"] = heads
    config["num_key_value_heads"] = heads
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(kvtune_command("plan", str(folder), cwd=tmp_path), "num_")
    assert_refused(tune(tmp_path, good_workload(tmp_path), model=str(folder)), "num_")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("I am not a folder")
    args = [
        "tune",
        str(reference_model_path()),
        "--workload",
        str(good_workload(tmp_path)),
        "--out",
        str(blocker / "out"),
    ]
    assert_refused(kvtune_command(*args, cwd=tmp_path), str(blocker))
    assert blocker.read_text() == "I am not a folder"


def test_a_vllm_that_is_not_there_is_exit_3_with_the_line_that_installs_it(tmp_path: Path) -> None:
    result = tune(tmp_path, good_workload(tmp_path), "--engine", "vllm", "--vllm-python", "/no/such/python")
    assert_refused(result, "/no/such/python", code=3)
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_a_recipe_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"schema_version": 1, "content_hash": "0" * 64}))
    assert_refused(kvtune_command("emit", str(path), "--target", "vllm", cwd=tmp_path), "recipe.json")


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("{}")
    (out / "recipe.json").write_text("ten minutes of work")
    assert_refused(tune(tmp_path, good_workload(tmp_path)), str(out), "--out")
    assert (out / "recipe.json").read_text() == "ten minutes of work"
