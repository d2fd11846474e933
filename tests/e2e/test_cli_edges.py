"""Edges of the command line: whatever is typed, sent or closed, one clear line, the right exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtune.cli.main import main
from kvtune.testing.reference import reference_model_path

TOPICS = ("zip", "abs", "json.dumps", "len", "os.path.join", "max", "sorted", "re.match", "iter", "hash")
COMMAND = [sys.executable, "-m", "kvtune"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def said(capsys: pytest.CaptureFixture[str], args: list[str], code: int = 2) -> str:
    """The one line on stderr of a refused command."""
    assert main(args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvtune: "), lines
    return lines[0]


def workload(path: Path, **extra: object) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"What does {t} do?"}], "max_tokens": 4, **extra}
            for t in TOPICS]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- what is typed --


def test_no_arguments_show_the_help_and_no_empty_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert "tune" in shown.out and shown.err == ""


def test_wrong_usage_names_the_help_that_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`kvtune plan --help`" in said(capsys, ["plan"])
    assert "`kvtune --help`" in said(capsys, ["nonsense"])


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999", "http://", "http://a b", "http://[::1", "nonsense"]
)
def test_a_url_no_server_can_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    asked = ["bench", "--url", url, "--workload", str(workload(tmp_path / "w.jsonl"))]
    assert "server URL" in said(capsys, asked)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--seed", "-1"], "--seed"), (["--burstiness", "inf", "--request-rate", "3"], "--burstiness"),
        (["--deadline", "9" * 400], "duration"),
    ],
)  # fmt: skip
def test_numbers_beyond_sense_are_refused_by_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], word: str
) -> None:
    asked = [
        "bench",
        "--model",
        str(reference_model_path()),
        "--workload",
        str(workload(tmp_path / "w.jsonl")),
    ]
    assert word in said(capsys, [*asked, *flags])


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--seed", "-1"], "--seed"), (["--kv-budget", "9" * 400], "size"), (["--budget", "9" * 400], "dura"),
        (["--budget", ""], "duration"),
    ],
)  # fmt: skip
def test_numbers_beyond_sense_are_refused_by_tune(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], word: str
) -> None:
    asked = ["tune", str(reference_model_path()), "--workload", str(workload(tmp_path / "w.jsonl"))]
    assert word in said(capsys, [*asked, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_bench_refuses_a_file_it_cannot_save_to_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "bench",
        "--model",
        str(reference_model_path()),
        "--workload",
        str(workload(tmp_path / "w.jsonl")),
    ]
    assert "--save" in said(capsys, [*asked, "--save", str(tmp_path / "absent" / "x.json")])


# -- what is in the files --


def test_a_budget_the_machine_does_not_have_is_refused(tmp_path: Path) -> None:
    from kvtune import CacheConfig, Engine
    from kvtune.errors import UsageError

    with pytest.raises(UsageError, match="cannot be allocated"):
        Engine.from_pretrained(str(reference_model_path()), cache=CacheConfig(kv_budget="900TiB"))


def test_a_chat_template_that_refuses_the_messages_rejects_them_by_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reference_model_path(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    asked = ["bench", "--model", str(folder), "--workload", str(workload(tmp_path / "w.jsonl"))]
    assert main(asked) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "roles must alternate" in errors[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 100}, ("embed_tokens", "[2048", "[100")),
        ({"rope_parameters": "x"}, ("rope_parameters",)),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    from kvtune.adapters.prompt_encoder import prompt_encoder
    from kvtune.engine.load import load_model
    from kvtune.errors import InputFileError

    folder = tmp_path / "model"
    shutil.copytree(reference_model_path(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputFileError) as refusal:
        load_model(folder)
    assert all(word in str(refusal.value) for word in words), refusal.value
    if "rope_parameters" in changes:  # the tokenizer is read by the config's model type
        with pytest.raises(InputFileError, match="rope_parameters"):
            prompt_encoder(folder)


def test_a_recipe_that_lacks_what_it_was_judged_by_is_refused_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvtune.recipe import Recipe

    sections = ("model", "engine", "hardware", "workload", "evidence", "fallback")
    recipe = Recipe(
        **{name: {"name": "kvtune"} for name in sections}, baseline={"configuration": {}},
        configuration={name: {} for name in ("knobs", "cache", "scheduler", "engine")},
        quality={"verdict": "PASS"}, read_contract="T0", kernel="native", codec_constants_sha256="",
    ).save(tmp_path / "recipe.json")  # fmt: skip
    asked = ["check", "--recipe", str(recipe), "--workload", str(workload(tmp_path / "w.jsonl"))]
    assert "provenance.margin" in said(capsys, asked)


def test_a_request_name_that_is_no_unicode_reaches_the_report(tmp_path: Path) -> None:
    from kvtune.recipe import write_atomically

    write_atomically(tmp_path / "report.html", "id \ud800")
    assert (tmp_path / "report.html").read_text() == "id \\ud800"


# -- where it runs --


def test_doctor_works_in_a_folder_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "no current folder" in shown and "cd into" in shown


def test_a_full_disk_is_one_line_and_exit_3() -> None:
    with Path("/dev/full").open("w") as full:
        for extra in ([], ["--json"]):
            result = subprocess.run(
                [*COMMAND, "plan", "meta-llama/Llama-3.1-8B", *extra],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=ENVIRONMENT,
            )  # fmt: skip
            assert result.returncode == 3 and result.stderr.count("\n") == 1
            assert "No space left" in result.stderr


def test_a_file_that_cannot_be_replaced_is_one_object_and_exit_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object, **__: object) -> None:
        raise IsADirectoryError(21, "Is a directory", "report.html")

    monkeypatch.setattr("kvtune.workload.workload_statistics", refuse)
    assert main(["trace", str(workload(tmp_path / "w.jsonl")), "--json"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["exit_code"] == 3 and "report.html" in shown.err


def test_a_closed_stdout_is_not_the_exit_code_of_the_gate() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*COMMAND, "plan", "meta-llama/Llama-3.1-8B"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_file_whose_name_is_no_text_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    workload(path)
    result = subprocess.run(
        [*COMMAND, "trace", path], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    assert "\\udcff.jsonl" in result.stdout


# -- interruption --


def tuning(tmp_path: Path, *extra: str) -> subprocess.Popen[str]:
    path = tmp_path / "w.jsonl"
    if not path.exists():
        workload(path)
    return subprocess.Popen(
        [*COMMAND, "tune", str(reference_model_path()), "--workload", str(path),
         "--out", str(tmp_path / "out"), "--budget", "2s", "--json", *extra],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def interrupt_once_begun(process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """Send a signal with the first line that shows a trial; returns the rest of stdout and stderr."""
    assert process.stderr is not None
    for line in process.stderr:
        if "trial" in line or "left  baseline" in line:
            break
    process.send_signal(number)
    return process.communicate(timeout=60)


def test_ctrl_c_also_in_a_resumed_run_names_the_command_that_resumes(tmp_path: Path) -> None:
    for extra in ((), ("--resume",)):
        process = tuning(tmp_path, *extra)
        out, error = interrupt_once_begun(process, signal.SIGINT)
        assert process.returncode == 130
        assert json.loads(out)["error"]["exit_code"] == 130
        assert error.splitlines()[-1].endswith(" --resume") and "Traceback" not in error
        assert error.count("--resume") == 1


def test_ctrl_c_before_the_study_began_leaves_nothing_and_promises_nothing(tmp_path: Path) -> None:
    process = tuning(tmp_path)
    mapped = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in mapped.read_text():  # the command runs, and is still importing its engine
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" not in error and not (tmp_path / "out").exists()


def test_a_killed_run_resumes_and_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    first = tuning(tmp_path)
    interrupt_once_begun(first, signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    runs = [tuning(tmp_path, "--resume") for _ in range(2)]
    outs = [run.communicate(timeout=60) for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes in ([0, 2], [0, 0]), outs
    assert all(
        "in use" in e or "another run" in e for (_, e), r in zip(outs, runs, strict=True) if r.returncode
    )
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["recipe"] == str(tmp_path / "out" / "recipe.json")
