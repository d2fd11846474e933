"""What README and docs say of gate, codecs and tables by layer holds again when it is measured again.

Each benchmark compares what it measures with what is promised and exits 1 where that does not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1800)]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GATE_SECTIONS = [word for name in ("coverage", "damage", "probes", "cost") for word in ("--only", name)]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        pytest.param("bench_gate.py", ["--only", "speed", "--work", "work"], id="speed is called rightly"),
        pytest.param("bench_gate.py", [*GATE_SECTIONS, "--work", "work"], id="the gate is rarely wrong"),
        pytest.param(
            "bench_codec_quality.py", ["--samples", "64", "--tokens", "1024"], id="codecs keep their order"
        ),
        pytest.param(
            "bench_codec_quality.py",
            ["--samples", "64", "--tokens", "1024", "--variant", "biased_keys"],
            id="rotation and centring halve what int4 loses on biased keys",
        ),
        pytest.param("bench_allocation.py", ["--variant", "model"], id="tables beat uniform pairs"),
    ],
)
def test_a_published_line_holds_again(script: str, arguments: list[str], tmp_path: Path) -> None:
    if not (BENCHMARKS / script).exists():
        pytest.skip("benchmarks are not installed")
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(result)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(result.read_text())
