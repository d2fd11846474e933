"""The shape of the house: what importing costs, and what the command line promises everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvtune

HEAVY = ("torch", "transformers", "triton", "vllm", "optuna", "tokenizers")
TENSOR_FREE = (
    "kvtune", "kvtune.types", "kvtune.config", "kvtune.spec", "kvtune.target", "kvtune.recipe", "kvtune.plan",
    "kvtune.workload", "kvtune.predict", "kvtune.cache", "kvtune.sched", "kvtune.report", "kvtune.quality",
    "kvtune.tune", "kvtune.cli.main", "kvtune.cli.plan", "kvtune.cli.trace", "kvtune.cli.tune",
    "kvtune.cli.emit", "kvtune.cli.bench", "kvtune.cli.doctor", "kvtune.cli.simulate", "kvtune.cache.replay",
    "kvtune.latency", "kvtune.sim", "kvtune.cli.simulate_serve", "kvtune.printable", "kvtune.standing",
    "kvtune.cli.check", "kvtune.cli.verify",
)  # fmt: skip


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, check=False)


def kvtune_command(*args: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "kvtune", *args)


@pytest.mark.parametrize("module", TENSOR_FREE)
def test_importing_a_tensor_free_package_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_listed_and_exists() -> None:
    for name in kvtune.__all__:
        assert getattr(kvtune, name) is not None
    assert sorted(kvtune.__all__) == kvtune.__all__


def test_asking_for_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvtune.no_such_name


@pytest.mark.parametrize(
    "args", [["no-such-verb"], ["plan"], ["plan", "--no-such-flag", "x"], ["emit"], ["tune"]]
)
def test_wrong_usage_is_one_line_and_exit_2(args: list[str]) -> None:
    result = kvtune_command(*args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_errors_under_json_are_exactly_one_object_on_stdout() -> None:
    result = kvtune_command("plan", "/no/such/model", "--json")
    assert result.returncode == 2
    body = json.loads(result.stdout)
    assert body["error"]["exit_code"] == 2
    assert "/no/such/model" in body["error"]["message"]


def test_help_names_every_verb() -> None:
    result = kvtune_command("--help")
    assert result.returncode == 0
    for verb in ("plan", "trace", "simulate", "tune", "emit", "check", "verify", "bench", "doctor"):
        assert verb in result.stdout


def test_version_is_printed() -> None:
    assert kvtune_command("--version").stdout.strip() == kvtune.__version__


def test_no_source_file_unpickles_or_runs_remote_code() -> None:
    source = Path(kvtune.__file__).parent
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
