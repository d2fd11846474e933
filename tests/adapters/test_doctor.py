"""The doctor: quick, honest about what is missing, with the line that fixes it."""

import json
import os
import subprocess
import sys
from pathlib import Path


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
