"""Every benchmark, one after the other, each in a process of its own; results go to benchmarks/results.

    python benchmarks/run_all.py [--traces DIR]

Without --traces (or KVTUNE_TRACES) the benchmarks that need a public trace are named and left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, default=os.environ.get("KVTUNE_TRACES"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    alone = (
        "bench_decode", "bench_prefill", "bench_shared_prefix", "bench_encode", "bench_damage",
        "bench_allocation", "bench_grouping", "bench_control_plane",
    )  # fmt: skip
    commands = {name: ["--json", str(args.out / f"{name}.json")] for name in alone}
    variants = ("biased_keys", "heavy_tailed_values")
    commands["bench_codec_quality"] = [
        "--json", str(args.out / "bench_codec_quality.json"),
        *(word for name in variants for word in ("--variant", name)),
    ]  # fmt: skip
    commands["bench_step"] = ["--json", str(args.out / "bench_step.json")]
    commands["bench_engine"] = ["--json", str(args.out / "bench_engine.json")]
    commands["bench_gate"] = ["--json", str(args.out / "bench_gate.json")]
    commands["bench_squeeze"] = ["--json", str(args.out / "bench_squeeze.json")]
    commands["bench_simulate"] = ["--json", str(args.out / "bench_simulate.json")]
    if args.traces:
        trace = Path(args.traces) / "azure2023_conv.csv.gz"
        commands["bench_capacity"] = ["--trace", str(trace), "--json", str(args.out / "bench_capacity.json")]
        for name in ("bench_replay", "bench_eviction", "bench_predict"):
            commands[name] = ["--traces", str(args.traces), "--json", str(args.out / f"{name}.json")]
    else:
        print("bench_capacity, _replay and _predict left out: give --traces DIR with the public traces")
    if os.environ.get("KVTUNE_VLLM_PYTHON"):
        commands["bench_vllm_attention"] = ["--json", str(args.out / "bench_vllm_attention.json")]
    else:
        print("bench_vllm_attention left out: KVTUNE_VLLM_PYTHON names the Python of a vLLM installation")
    failed: list[str] = []
    for name, flags in commands.items():
        print(f"== {name} {' '.join(flags)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *flags], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
