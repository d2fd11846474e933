"""The doctor: quick, honest about what is missing, with the line that fixes it."""

import _ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvtune
from kvtune.cli.main import main


def doctor(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kvtune", "doctor", *args],
        capture_output=True, text=True, timeout=90, check=False, env=os.environ | environment,
    )  # fmt: skip


def test_it_names_machine_packages_kernel_and_vllm():
    found = json.loads(doctor("--json").stdout)
    names = [finding["name"] for finding in found["findings"]]
    for name in (
        "python",
        "cpu",
        "memory",
        "disk",
        "gpu",
        "torch",
        "transformers",
        "optuna",
        "kernel",
        "vllm",
    ):
        assert name in names
    assert found["host"]["num_cpus"] == len(os.sched_getaffinity(0))
    assert all(
        finding["fix"]
        for finding in found["findings"]
        if finding["status"] != "ok" and finding["name"] != "kernel"
    )


def test_every_fix_stands_below_what_it_fixes_in_the_text(tmp_path):
    done = doctor(PATH=str(tmp_path))
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if "vllm" in line and "no `vllm` on PATH" in line)
    assert "--vllm-python" in lines[at + 1]


def test_without_torch_the_engine_cannot_run_which_is_exit_3_and_the_line_that_installs_it():
    blocked = "import importlib.util as u\nreal = u.find_spec\n" \
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n" \
        "import sys\nfrom kvtune.cli.main import main\nsys.exit(main(['doctor', '--json']))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 3
    report = json.loads(done.stdout)
    torch = next(finding for finding in report["findings"] if finding["name"] == "torch")
    assert torch["fix"] == "pip install 'kvtune[engine]'"
    assert report["engine_can_run"] is False


def test_a_vllm_on_path_is_found_with_its_python_without_being_imported(tmp_path):
    for name in ("vllm", "python"):
        command = tmp_path / name
        command.write_text("#!/bin/sh\nexit 1\n")
        command.chmod(0o755)
    found = json.loads(doctor("--json", PATH=str(tmp_path)).stdout)
    vllm = next(finding for finding in found["findings"] if finding["name"] == "vllm")
    assert vllm["status"] == "ok"
    assert str(Path(tmp_path) / "python") in vllm["found"]


LIBRARIES = {
    "kernel": ("kvtune.kernels.dispatch.library_path", "many times slower"),
    "engine layers": ("kvtune.engine.layer_ops.library_path", "short steps take longer"),
    "cache pools": ("kvtune.cache.native.library_path", "run in Python"),
    "replay": ("kvtune.cache.replay_native.library_path", "kvtune simulate"),
}


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", "--json"])
    return code, {found["name"]: found for found in json.loads(capsys.readouterr().out)["findings"]}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_was_not_built_is_a_note_that_says_what_is_lost_and_how_to_build_it(
    name, monkeypatch, capsys
):
    monkeypatch.setattr(LIBRARIES[name][0], lambda: None)
    code, found = findings(capsys)
    assert found[name]["status"] == "note" and LIBRARIES[name][1] in found[name]["found"]
    assert "C++17" in found[name]["fix"] and code == 0


@pytest.mark.parametrize("name", ["engine layers", "cache pools", "replay"])
@pytest.mark.parametrize("content", ["cut off", "of others"])
def test_a_library_that_does_not_load_is_missing_with_its_reason(
    name, content, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "libx.so"
    if content == "cut off":
        path.write_bytes(b"\x7fELF")
    else:
        path = Path(_ctypes.__file__)
    monkeypatch.setattr(LIBRARIES[name][0], lambda: path)
    code, found = findings(capsys)
    assert code == 3 and found[name]["status"] == "missing" and "not load" in found[name]["found"]
    assert "C++17" in found[name]["fix"]


def test_every_native_library_of_the_package_is_named(capsys):
    _, found = findings(capsys)
    assert set(LIBRARIES) <= set(found)
    built = {path.name for root in kvtune.__path__ for path in Path(root).rglob("lib*.so")}
    shown = " ".join(found[name]["found"] for name in LIBRARIES)
    assert all(name in shown or name == "libkvtune_kernels.so" for name in built), built
