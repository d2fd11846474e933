"""`kvtune report` redraws a run's page from the JSON alone, byte for byte, and shares it without texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_sample import HOSTILE, sample_result

from kvtune.cli.main import main
from kvtune.cli.report import redacted
from kvtune.report import render, render_markdown


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What `kvtune tune` leaves behind: the JSON, and pages drawn from the record in memory."""
    folder = tmp_path / "run"
    folder.mkdir()
    record = sample_result()
    (folder / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "report.html").write_text(render(record))
    (folder / "report.md").write_text(render_markdown(record))
    return folder


def test_page_and_markdown_are_redrawn_byte_for_byte(run_folder: Path, tmp_path: Path) -> None:
    assert main(["report", str(run_folder), "--out", str(tmp_path / "again")]) == 0
    for name in ("report.html", "report.md"):
        assert (tmp_path / "again" / name).read_bytes() == (run_folder / name).read_bytes()


def test_without_out_the_files_lie_beside_the_json(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "report.html").unlink()
    assert main(["report", str(run_folder / "result.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["html"] == str(run_folder / "report.html")
    assert printed["verdict"] == "PASS"
    assert (run_folder / "report.html").stat().st_size > 10_000


def texts_of(record: dict[str, Any]) -> list[str]:
    samples = record["answers_side_by_side"]["samples"]
    return [sample[key] for sample in samples for key in ("prompt_end", "baseline", "winner")]


def test_redacted_pages_hold_no_prompt_and_no_answer(run_folder: Path, tmp_path: Path) -> None:
    record = sample_result()
    for index, sample in enumerate(record["answers_side_by_side"]["samples"]):
        sample |= {key: f"secret-{index}-{key}" for key in ("prompt_end", "baseline", "winner")}
    record["quality"]["answers"]["requests"][0] |= {
        "baseline_answer": "secret-a",
        "candidate_answer": "secret-b",
    }
    (run_folder / "result.json").write_text(json.dumps(record))
    assert "secret" in render(record)
    assert main(["report", str(run_folder), "--out", str(tmp_path / "shared"), "--redact"]) == 0
    for name in ("report.html", "report.md"):
        shown = (tmp_path / "shared" / name).read_text()
        assert "secret" not in shown
        assert "(redacted)" in shown or "redacted" in shown
    assert texts_of(record)[0].startswith("secret")  # the record itself is left as it was


def test_redaction_keeps_every_number() -> None:
    record = sample_result()
    shown = redacted(record)
    assert shown["quality"]["metrics"] == record["quality"]["metrics"]
    assert [s["kl"] for s in shown["answers_side_by_side"]["samples"]] == [0.01, 0.005, 0.01 / 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{", "is not a tuning result"),
        ("[1]", "it has no winner"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps({"winner": {}, "baseline": {}}), "it has no quality"),
        (json.dumps({"winner": HOSTILE, "baseline": {}, "quality": {}}), "it has no winner"),
    ],
)
def test_what_is_no_result_is_one_line_and_exit_2(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    assert main(["report", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run_folder), "--out", str(run_folder / "result.json" / "inside")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_redrawing_needs_neither_torch_nor_optuna(run_folder: Path) -> None:
    code = (
        "import sys; from kvtune.cli.main import main; assert main(['report', sys.argv[1]]) == 0;"
        "print(sorted({'torch', 'transformers', 'optuna'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(run_folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
