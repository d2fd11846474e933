"""How long the tensor-free verbs take to start, beside a bare interpreter that imports numpy.

    python benchmarks/bench_start.py [--rounds 15] [--json OUT]

Each round runs every command once, in turn, so that a slow moment hits them alike. torch, transformers and
optuna are hidden from every run: a folder of empty stand-ins that refuse to be imported comes first on the
path, so a verb that reached for one would fail. Reported: medians of wall time, and the median of the
difference to the bare interpreter of the same round, which is what must stay under 0.3 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN = ("torch", "transformers", "optuna", "tokenizers", "safetensors", "vllm", "triton")
ROWS = [
    {"timestamp": 1000 * i, "input_length": 1024, "output_length": 16, "hash_ids": [0, i + 1]}
    for i in range(50)
]


def commands(trace: Path) -> dict[str, list[str]]:
    kvtune = ["-m", "kvtune"]
    return {
        "bare numpy": ["-c", "import numpy"],
        "plan": [*kvtune, "plan", "qwen3-32b", "--json"],
        "plan, table": [*kvtune, "plan", "qwen3-32b"],
        "trace": [*kvtune, "trace", str(trace), "--trace-block-size", "512", "--json"],
        "simulate": [
            *kvtune, "simulate", str(trace), "--mode", "cache", "--policy", "lru", "--capacity-blocks", "20",
            "--trace-block-size", "512", "--json",
        ],
    }  # fmt: skip


def hide(folder: Path) -> dict[str, str]:
    """An environment in which heavy packages cannot be imported."""
    for name in HIDDEN:
        (folder / f"{name}.py").write_text(f'raise ImportError("{name} is hidden here")\n')
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def seconds(args: list[str], environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *args], env=environment, capture_output=True, check=True)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        trace.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        environment = hide(Path(folder))
        runs = commands(trace)
        for command in runs.values():
            seconds(command, environment)  # byte code and page cache
        rounds = [
            {name: seconds(command, environment) for name, command in runs.items()}
            for _ in range(args.rounds)
        ]
    result = {
        name: {
            "median_s": statistics.median(r[name] for r in rounds),
            "above_numpy_s": statistics.median(r[name] - r["bare numpy"] for r in rounds),
        }
        for name in runs
    }
    for name, row in result.items():
        print(f"{name:12s} {1000 * row['median_s']:6.0f} ms  {1000 * row['above_numpy_s']:+6.0f} ms")
    if args.json:
        args.json.write_text(
            json.dumps({"rounds": args.rounds, "load": os.getloadavg()[0], **result}, indent=2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
