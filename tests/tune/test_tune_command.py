"""`kvtune tune` as typed: one JSON object, one line per error, a command to resume with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.cli import tune as command
from kvtune.cli.main import main
from kvtune.recipe import Recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sixty sessions of two turns; 16 tokens per hash id."""
    rows = [
        {"timestamp": 1000 * (2 * s + t), "input_length": 40 + 16 * t, "output_length": 20,
         "hash_ids": [10 * s + i for i in range(3 + t)]}
        for s in range(60) for t in range(2)
    ]  # fmt: skip
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def target(fake: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = fake()
    monkeypatch.setattr(command, "open_target", lambda *_, **__: (made, 48, 512))
    return made


def arguments(model: Path, trace: Path, out: Path) -> list[str]:
    paths = [str(model), "--workload", str(trace), "--out", str(out)]
    return ["tune", *paths, "--budget", "60s", "--seed", "3", "--trace-block-size", "16"]


def test_json_is_one_object_and_the_report_needs_no_network(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*arguments(model, trace, out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"recipe", "baseline", "winner", "gain", "quality", "aa_noise", "trials"} <= record.keys()
    assert record["quality"]["verdict"] == "PASS" and record["quality"]["proven"] is False
    assert Recipe.load(record["recipe"]).workload["is_synthetic_text"] is True
    assert "--seed 3" in record["command"] and str(trace) in record["command"]
    page = (out / "report.html").read_text()
    assert len(page) < 2 << 20 and 'src="http' not in page and "int8" in page


def test_the_end_shows_winner_bytes_held_verdict_and_the_next_command(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, trace, tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "k_codec int8, v_codec int8" in text and "0.516x" in text
    assert "verdict     PASS" in text and "not proven" in text and "next step" in text and "FAIL" in text
    assert f"kvtune emit {tmp_path / 'out' / 'recipe.json'} --target transformers" in text


def test_a_squeeze_is_proven_only_when_asked_and_the_command_repeats_it(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(model, trace, tmp_path / "out"), "--squeeze"]) == 0
    assert "squeeze     no low plane may go: no side of the winner is stored" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["command"].endswith("--squeeze")
    assert main([*arguments(model, trace, tmp_path / "other"), "--squeeze", "--engine", "vllm"]) == 2
    assert "cannot read one plane of two" in capsys.readouterr().err


def test_a_squeeze_leaves_the_margin_to_the_planes_unless_told_otherwise(
    layered: Any, model: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_target", lambda *_, **__: (layered(), 48, 512))
    asked = {
        "plain": [],
        "squeeze": ["--squeeze"],
        "both": ["--squeeze", "--per-layer"],
        "none": ["--no-per-layer"],
    }
    found: dict[str, dict[str, Any]] = {}
    for name, flags in asked.items():
        out = tmp_path / name
        assert main([*arguments(model, trace, out), *flags]) == 0
        found[name] = json.loads((out / "result.json").read_text())
        assert {*flags} == {*found[name]["command"].split()} & {"--squeeze", "--per-layer", "--no-per-layer"}
    assert [name for name, record in found.items() if record["layers"] is not None] == ["plain", "both"]


def test_an_interrupt_exits_130_and_says_how_to_resume(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads: list[str] = []

    def crash(config: Any, stage: str) -> None:
        loads.append(stage)
        if config["k_codec"] == "int8" and stage == "load":
            raise KeyboardInterrupt

    target.crash = crash
    asked = arguments(model, trace, tmp_path / "out")
    assert main(asked) == 130
    assert "--resume" in capsys.readouterr().err and target.num_open == 0
    assert main(asked) == 2
    assert "--resume" in capsys.readouterr().err
    target.crash = lambda *_: None
    assert main([*asked, "--resume"]) == 0


@pytest.mark.parametrize("garbage", [b"\xff\n", b"{}\n", b"[]\n", b'{"a": 1}\n', b"not json\n"])
def test_a_damaged_journal_is_refused_before_the_engine_starts(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], garbage: bytes
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.journal").write_bytes(garbage)
    assert main([*arguments(model, trace, out), "--resume"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "damaged" in error and "another --out" in error and target.starts == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--margin", "lossless"], "unknown margin"), (["--slo", "p95=3"], "--slo wants"),
        (["--budget", "soon"], "duration"), (["--kv-budget", "lots"], "size"), (["--dtype", "int3"], "dtype"),
        (["--resume"], "nothing to resume"), (["--demo"], "brings its own model"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_exit_2_and_leave_nothing(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    extra: list[str], said: str,
) -> None:  # fmt: skip
    assert main([*arguments(model, trace, tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]
    assert not (tmp_path / "out").exists() and target.starts == []


@pytest.mark.parametrize("content", [b"", b'{"a": 1}\n' * 6 + b"{broken\n", b"\x00\xff\x01" * 40])
def test_a_bad_workload_is_exit_2_before_the_engine_starts(
    target: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    assert main([*arguments(model, file, tmp_path / "out"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2
    assert target.starts == [] and not (tmp_path / "out").exists()


def test_an_unwritable_folder_and_a_missing_model_are_exit_2(
    target: Any, model: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(model, trace, tmp_path / "file" / "out")) == 2
    assert main(arguments(tmp_path / "absent", trace, tmp_path / "out")) == 2
    assert "not found" in capsys.readouterr().err and target.starts == []
