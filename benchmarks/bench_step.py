"""Where the time of an engine step goes: decode and prefill, through Transformers' modules and fused.

    python benchmarks/bench_step.py [--threads 1] [--rounds 15] [--behind 8192] [--codecs bf16 int8]
                                    [--json OUT]

The 80M Llama of bench_engine.py; 32 sequences at 1k decode, then 512 tokens of a prompt are prefilled at its
start and behind `--behind` others. Both engines take the same step in turn. Reported: medians of the whole
step and of its parts by the clock of the harness (CPU time with one thread), and the share that is neither
matrix product nor attention. Encoding at write is told apart; it counts as outside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_engine import MODEL, write_model
from harness import Clock, clock_for, cpu_name, l3_size, probe
from torch.nn import functional
from transformers import AutoModelForCausalLM

from kvtune import CacheConfig, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import Engine, LoadedModel, attention, decoder, load_model

CHUNK = 512


class Parts:
    """Adds up the time spent in wrapped functions."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: Counter[str] = Counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            result = function(*args, **kwargs)
            self.seconds[part] += self._clock() - start
            return result

        return call

    def take(self, total: float) -> dict[str, float]:
        """Seconds by part; what no part explains is "rest"."""
        parts = {**self.seconds, "total": total, "rest": total - sum(self.seconds.values())}
        self.seconds.clear()
        return parts


def watch_products_and_writes(parts: Parts, dtype: torch.dtype) -> None:
    """Whole-process hooks: products of Transformers' modules and of the fused decoder, encoding at write."""
    functional.linear = parts.timed("products", functional.linear)
    if decoder.can_pack(dtype):  # else it multiplies by functional.linear, too
        decoder.Linear.__call__ = parts.timed("products", decoder.Linear.__call__)  # type: ignore[method-assign]
    attention.write_kv = parts.timed("encoding", attention.write_kv)


def make_engine(loaded: LoadedModel, codec: str, parts: Parts) -> Engine:
    engine = Engine.from_pretrained(
        loaded,
        cache=CacheConfig(kv_budget="1GiB", k_codec=codec, v_codec=codec),
        scheduler=SchedulerConfig(
            max_num_seqs=64, max_num_batched_tokens=CHUNK, max_prefill_beside_decodes=CHUNK
        ),
    )
    for layer in engine.attention_layers.values():
        layer.attend = parts.timed("attention", layer.attend)
    return engine


def run_together(
    engines: dict[str, Engine], prompts: list[list[int]], parts: Parts, clock: Clock, rounds: int
) -> dict[str, list[list[dict[str, float]]]]:
    """Every engine's [prefill steps, decode steps], in order, each a list of parts; engines take turns.

    Ends after `rounds` steps in which all prompts decode (with 0: when they are prefilled).
    """
    longest = rounds + 2 * sum(map(len, prompts)) // CHUNK  # the first decode while the last are prefilled
    params = SamplingParams(max_tokens=longest if rounds else 1, temperature=0.0, ignore_eos=True)
    steps: dict[str, list[list[dict[str, float]]]] = {name: [[], []] for name in engines}
    for engine in engines.values():
        engine.reset_prefix_cache()
        for i, prompt in enumerate(prompts):
            engine.add_request(f"r{i}", prompt, params)
    while any(
        engine.has_unfinished and len(steps[name][1]) < max(1, rounds) for name, engine in engines.items()
    ):
        for name, engine in engines.items():
            parts.seconds.clear()
            start = clock()
            moved = engine.step()
            taken = parts.take(clock() - start)
            is_decode = len(moved) == len(prompts) and all(len(out.token_ids) > 1 for out in moved)
            steps[name][is_decode].append(taken)
    for engine in engines.values():
        for i in range(len(prompts)):
            engine.abort(f"r{i}")
        engine.discard_outputs()
    return steps


def median_parts(steps: list[dict[str, float]]) -> dict[str, float]:
    names = {name for step in steps for name in step}
    parts = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in sorted(names)}
    inside = parts.get("products", 0.0) + parts.get("attention", 0.0)
    return {
        **{n: round(1e3 * s, 3) for n, s in parts.items()},
        "outside": round(1 - inside / parts["total"], 4),
    }


def measure(
    engines: dict[str, Engine], parts: Parts, clock: Clock, rounds: int, behind_tokens: int
) -> dict[str, dict[str, dict[str, float]]]:
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return rng.integers(3, MODEL["vocab_size"], length).tolist()

    decode = run_together(engines, [prompt(1024) for _ in range(32)], parts, clock, rounds)
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    behind: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(max(3, rounds // 5)):
        for name, (prefills, _) in run_together(
            engines, [prompt(behind_tokens + CHUNK)], parts, clock, 0
        ).items():
            starts[name].append(prefills[0])
            behind[name].append(prefills[-1])
    return {
        name: {
            "decode 32 x 1k": median_parts(decode[name][1]),
            "prefill 512 at 0": median_parts(starts[name]),
            f"prefill 512 behind {behind_tokens}": median_parts(behind[name]),
        }
        for name in engines
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--behind", type=int, default=8192, help="tokens before the second prefill step")
    parser.add_argument("--codecs", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = clock_for(args.threads)
    parts = Parts(clock)
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto", attn_implementation="eager")
        loaded = load_model(model, EngineConfig())  # a model object keeps its modules' own weights
    watch_products_and_writes(parts, loaded.dtype)
    record: dict[str, Any] = {
        "benchmark": "parts of an engine step [ms]", "model": MODEL, "threads": args.threads,
        "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs, L3 {l3_size()}", "torch": torch.__version__,
        "probes": [dataclasses.asdict(probe(args.threads))], "codecs": {},
    }  # fmt: skip
    for codec in args.codecs:
        engines = {
            "modules": make_engine(dataclasses.replace(loaded, decoder=None), codec, parts),
            "fused": make_engine(loaded, codec, parts),
        }
        result = measure(engines, parts, clock, args.rounds, args.behind)
        record["codecs"][codec] = result
        for engine in engines.values():
            engine.close()
        for name, steps in result.items():
            for step, ms in steps.items():
                print(f"{codec:6} {name:8} {step:22} outside {ms['outside']:6.1%}  {ms}", flush=True)
    record["probes"].append(dataclasses.asdict(probe(args.threads)))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
