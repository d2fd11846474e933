"""Serving: kvtune's engine beside vLLM's CPU engine and Transformers, on one model and the same requests.

    python benchmarks/bench_engine.py --vllm-python PATH [--threads 1 2] [--rounds 5] [--json OUT]
        [--size debug|small|full] [--cells short decode ...] [--engines kvtune-bf16 vllm ...]

An 80M Llama (GQA 4, head dim 128, random weights) is written with Transformers and loaded by every engine.
Each engine lives in a process of its own and stays warm; a round asks them in turn, one later than the round
before, for the same requests, new in every round, prefix caches emptied first. Cells:

    short      32 x (128 in, 128 out)                             output tokens/s of the run
    decode     8 sequences at 8k                                  output tokens/s while all of them decode
    prefill    1 x 8k in                                          prompt tokens/s
    shared     4 x (8k in, half of it shared, 128 out)            output tokens/s of the run
    mixed      8 decode beside two 4k prompts that come later     output tokens/s of the run
    lengths    32 x (16..512 in, 16..128 out)                     output tokens/s of the run

Every run also gives the median time to the first token and the 99th percentile of the gaps between tokens.
Transformers answers whole batches: it takes part in `short` and `lengths`. With one thread the clock is each
process's CPU time, with more it is wall time. Beside every result: the least time the same threads need to
read what has to be read and multiply what has to be multiplied (see `least_seconds`).

Results are kept in OUT after every cell; a later call adds to those there, or replaces them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Elsewhere, Limit, cpu_name, l3_size, measure_limit, probe
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
SCALES = {"debug": 32, "small": 4, "full": 1}
"""What lengths are divided by."""
MODEL = {
    "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
ENGINES = {
    "kvtune-bf16": ("kvtune", "bf16"), "kvtune-int8": ("kvtune", "int8"), "vllm": ("vllm", "eager"),
    "vllm-compiled": ("vllm", "compiled"), "transformers": ("transformers", ""),
    "continuous": ("continuous", ""),
}  # fmt: skip
KV_BYTES_PER_ELEMENT = {"kvtune-int8": 1.0}
DECODE_TOKENS = 512
"""More than a request decodes beside the prefills of those behind it."""


@dataclass(frozen=True)
class Cell:
    """Requests of one round. `early`: how many are there at once; the others come when those decode.
    `enough`: the round ends when each request has so many tokens. `counts`: which tokens the rate counts,
    which phase it times."""

    prompts: list[list[int]]
    max_tokens: list[int]
    early: int | None = None
    counts: str = "output"
    enough: int | None = None

    def rate(self, times: list[list[float]], seconds: float) -> float:
        """Tokens per second."""
        if self.counts == "prompt":
            return sum(map(len, self.prompts)) / max(own[0] for own in times)
        if self.counts == "decode":
            start, end = max(own[0] for own in times), min(own[-1] for own in times)  # all decode
            return sum(start < t <= end for own in times for t in own) / (end - start)
        return sum(self.max_tokens) / seconds


def make_cell(name: str, rng: random.Random, scale: int) -> Cell:
    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, MODEL["vocab_size"]) for _ in range(max(2, length // scale))]

    out = max(6, 128 // scale)
    if name == "short":
        return Cell([prompt(128) for _ in range(32)], [out] * 32)
    if name == "decode":  # whoever is prefilled first decodes beside the others
        return Cell(
            [prompt(8192) for _ in range(8)], [DECODE_TOKENS] * 8, counts="decode",
            enough=max(8, 32 // scale),
        )  # fmt: skip
    if name == "prefill":
        return Cell([prompt(8192)], [1], counts="prompt")
    if name == "shared":
        shared = prompt(4096)
        return Cell([shared + prompt(4096) for _ in range(4)], [out] * 4)
    if name == "mixed":
        return Cell(
            [prompt(128) for _ in range(8)] + [prompt(4096) for _ in range(2)], [out] * 8 + [8] * 2, 8
        )
    lengths = [rng.choice([16, 64, 128, 256, 512]) for _ in range(32)]
    return Cell([prompt(n) for n in lengths], [rng.choice([16, 64, 128]) // min(scale, 8) for _ in range(32)])


WHOLE_RUNS = ("short", "lengths")
"""Cells that need no times of single tokens."""
CELLS = ("short", "decode", "prefill", "shared", "mixed", "lengths")


def least_seconds(cell: Cell, cell_name: str, limit: Limit, kv_bytes: float) -> float:
    """What reading and multiplying alone would take: prompts are multiplied, shared tokens once; each decode
    step reads all weights and every sequence's keys and values, or multiplies, whatever takes longer."""
    layers, hidden, dim = MODEL["num_hidden_layers"], MODEL["hidden_size"], MODEL["head_dim"]
    heads, kv_heads = MODEL["num_attention_heads"], MODEL["num_key_value_heads"]
    per_layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * MODEL["intermediate_size"]
    head = hidden * MODEL["vocab_size"]
    kv_token = 2.0 * layers * kv_heads * dim * kv_bytes
    shared = len(cell.prompts[0]) // 2 if cell_name == "shared" else 0
    prefill = 0.0
    for i, prompt in enumerate(cell.prompts):
        first, last = (shared if i else 0), len(prompt)
        pairs = (last * (last + 1) - first * (first + 1)) / 2
        prefill += 2.0 * layers * per_layer * (last - first) + 4.0 * layers * heads * dim * pairs
    least = limit.seconds(0.0, prefill)
    if cell.counts == "prompt":
        return least
    decode = 0.0
    if cell.counts == "decode":  # rate() counts while all decode
        least, last_step = 0.0, cell.enough or min(cell.max_tokens)
    else:
        last_step = max(cell.max_tokens)
    for step in range(1, last_step):
        alive = [len(p) + step for p, n in zip(cell.prompts, cell.max_tokens, strict=True) if n > step]
        flop = 2.0 * len(alive) * (layers * per_layer + head) + 4.0 * layers * heads * dim * sum(alive)
        decode += limit.seconds(2.0 * (layers * per_layer + head) + kv_token * sum(alive), flop)
    return least + decode


class Child(Elsewhere):
    """One engine in its process."""

    def __init__(self, name: str, model: Path, threads: int, python: str) -> None:
        kind, codec = ENGINES[name]
        self.has_steps = kind in ("kvtune", "vllm")
        super().__init__(
            name, [python, HERE / "engine_contenders.py", kind, model, str(threads), codec], threads
        )

    def run(self, cell: Cell, number: int) -> dict[str, Any]:
        return self.ask(
            prompts=cell.prompts, max_tokens=cell.max_tokens, early=cell.early, enough=cell.enough,
            round=number,
        )  # fmt: skip


def summary(cell: Cell, answer: dict[str, Any]) -> dict[str, float]:
    times = answer["times"]
    gaps = [b - a for own in times for a, b in itertools.pairwise(own)]
    first = [own[0] - arrival for own, arrival in zip(times, answer["arrivals"], strict=True)]
    return {
        "tokens_per_s": cell.rate(times, answer["seconds"]),
        "ttft_median_s": statistics.median(first),
        "itl_p99_s": sorted(gaps)[int(0.99 * len(gaps))] if gaps else 0.0,
        "itl_median_s": statistics.median(gaps) if gaps else 0.0,
        "seconds": answer["seconds"],
    }


def run_cell(
    name: str, children: list[Child], args: argparse.Namespace, threads: int, limit: Limit
) -> dict[str, Any]:
    scale, runs = SCALES[args.size], {child.name: [] for child in children}
    for attempt in range(1, args.attempts + 1):
        before = probe(threads)
        runs = {child.name: [] for child in children}
        for number in range(-1, args.rounds):  # the first one warms up
            cell = make_cell(name, random.Random(f"{name}/{attempt}/{number}"), scale)
            turn = max(number, 0) % len(children)
            for child in children[turn:] + children[:turn]:
                answer = child.run(cell, number)
                if number >= 0:
                    runs[child.name].append(summary(cell, answer))
        after = probe(threads)
        if before.is_quiet and after.is_quiet:
            break
    entry: dict[str, Any] = {
        "cell": name, "threads": threads, "rounds": args.rounds, "attempts": attempt,
        "probes": [asdict(before), asdict(after)],
        "is_quiet": before.is_quiet and after.is_quiet, "engines": {},
    }  # fmt: skip
    for engine, own in runs.items():
        rates = [run["tokens_per_s"] for run in own]
        entry["engines"][engine] = {
            **{key: statistics.median(run[key] for run in own) for key in own[0]},
            "tokens_per_s_all": rates,
            "least_seconds": least_seconds(cell, name, limit, KV_BYTES_PER_ELEMENT.get(engine, 2.0)),
        }
    return entry


def show(entry: dict[str, Any]) -> None:
    quiet = "" if entry["is_quiet"] else "  (machine busy: ratios alone mean something)"
    print(f"\n{entry['cell']}, {entry['threads']} thread(s){quiet}")
    peers = {n: e["tokens_per_s"] for n, e in entry["engines"].items() if not n.startswith("kvtune")}
    best = max(peers, key=lambda n: peers[n]) if peers else None
    for name, m in entry["engines"].items():
        ratio = f"  x{m['tokens_per_s'] / peers[best]:.2f} {best}" if best else ""
        print(
            f"  {name:14} {m['tokens_per_s']:8.1f} tok/s  TTFT {m['ttft_median_s']:7.3f} s  ITL median "
            f"{1e3 * m['itl_median_s']:6.1f} p99 {1e3 * m['itl_p99_s']:7.1f} ms  run {m['seconds']:6.2f} s  "
            f"least {m['least_seconds']:6.2f} s{ratio}",
            flush=True,
        )


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODEL, max_position_embeddings=16384, tie_word_embeddings=False, initializer_range=0.05,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attempts", type=int, default=2, help="tries of a cell until the machine is quiet")
    parser.add_argument("--size", choices=SCALES, default="full", help="debug: lengths over 32")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["kvtune-bf16", "kvtune-int8", "vllm"]
    )
    parser.add_argument("--vllm-python", default=os.environ.get("KVTUNE_VLLM_PYTHON"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if any(name.startswith("vllm") for name in args.engines) and not args.vllm_python:
        print("vLLM left out: give --vllm-python PATH or set KVTUNE_VLLM_PYTHON")
        args.engines = [name for name in args.engines if not name.startswith("vllm")]
    record: dict[str, Any] = {
        "benchmark": "serving beside vLLM and Transformers", "model": MODEL,
        "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs, L3 {l3_size()}", "torch": torch.__version__,
        "size": args.size, "limits": {}, "cells": [],
    }  # fmt: skip
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        record |= {key: before[key] for key in ("limits", "cells")}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "llama"
        write_model(model)
        for threads in args.threads:
            torch.set_num_threads(threads)
            limit = measure_limit(threads)
            record["limits"][str(threads)] = asdict(limit)
            pythons = {"vllm": args.vllm_python}
            with contextlib.ExitStack() as stack:
                children = [
                    stack.enter_context(
                        Child(name, model, threads, pythons.get(ENGINES[name][0], sys.executable))
                    )
                    for name in args.engines
                ]
                for name in args.cells:
                    able = [child for child in children if name in WHOLE_RUNS or child.has_steps]
                    if not able:
                        continue
                    entry = run_cell(name, able, args, threads, limit)
                    record["cells"] = [
                        other for other in record["cells"]
                        if (other["cell"], other["threads"]) != (name, threads)
                    ] + [entry]  # fmt: skip
                    show(entry)
                    if args.json:
                        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
