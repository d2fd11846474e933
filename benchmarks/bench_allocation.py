"""Bytes of the best uniform K x V pair and of the best per-layer table that pass the same gate, by model.

    python benchmarks/bench_allocation.py [--variant biased_keys ...] [--quick] [--json OUT]

On generated chats, split by session. Search half: every pair of codecs is replayed, then `tune`'s own search
by layer starts from the smallest that passed. Confirmation half: pairs in order of bytes, all that the search
did not find harmful, until one passes the whole gate (replay, decode replay, probes); then tables, smallest
first, all that passed the search or may yet. The pairs are each tested with the whole 5 % error, the tables
share theirs (Holm): what luck there is favours the pairs. Everything is deterministic but for the kernels'
arithmetic; speed is not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from models import model_folders, new_record

from kvtune.cli.gate_questions import gate_questions
from kvtune.cli.tune import materialised
from kvtune.config import EngineConfig, format_layer_codecs
from kvtune.engine.target import EngineTarget
from kvtune.errors import KVTuneError
from kvtune.quality import (
    ReplaySettings,
    SharedError,
    ask_baseline,
    judge_candidate,
    margin_named,
    record_reference,
)
from kvtune.testing.reference import reference_model_path
from kvtune.testing.variants import VARIANTS
from kvtune.tune import SearchSpace, TuneSettings, choose_for_quality
from kvtune.tune.evaluation import Evaluator, may_pass
from kvtune.tune.layer_search import LayerSearch, LayerTable, layer_record
from kvtune.tune.pace import Pace
from kvtune.workload import demo_chat, split_by_session

WANTED = 0.9
"""A table must take at most this many times the bytes of the best pair."""
CONTEXT = 2048
UNBOUNDED_S = 1e6


class Study:
    """One model: its target, both halves of the requests, and the gate's side of the baseline."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        self.args = args
        self.margin = margin_named("near-lossless", probes=args.probe_margin)
        self.target = EngineTarget(model, config=EngineConfig(num_threads=args.threads))
        length = self.target.loaded.max_model_len
        workload = demo_chat(args.requests, seed=args.seed, max_chars=4000)
        tokens = materialised(
            workload, model, self.target.loaded.vocab_size, length, scale=1.0, seed=args.seed
        )
        self.search, self.confirm = split_by_session(tokens.requests, 0.5, np.random.default_rng(args.seed))
        self.questions = gate_questions(workload, tokens, model, max_model_len=length, seed=args.seed)
        self.space = SearchSpace(self.target.knobs())
        self.settings = TuneSettings(
            budget_s=UNBOUNDED_S, probe_margin=args.probe_margin, kv_budget_bytes=args.kv_budget,
            seed=args.seed, context=CONTEXT, max_quality_requests=args.search_requests, max_load_requests=2,
            num_short_load=1, load_max_tokens=2,
        )  # fmt: skip
        self.pace = Pace(time.monotonic, UNBOUNDED_S)
        self.rng = np.random.default_rng(args.seed)
        self.evaluator = Evaluator(self.target, self.space, self.settings, pace=self.pace, rng=self.rng)

    # -- search half

    def pairs(self) -> list[dict[str, Any]]:
        """Every pair of codecs, fewest bytes first, with the gate's replay on the search half."""
        self.evaluator.measure_baseline(self.search)
        rows: list[dict[str, Any]] = []
        for size, config in reversed(self.space.ladder(self.target, context=CONTEXT)):
            quality = self.evaluator.verdicts.get(self.space.read_key(config))
            found = quality or self.evaluator.probe_quality(config)
            if found is None:
                continue
            rows.append({"config": config, "bytes_per_token": size, "search": brief(found)})
            print(line(rows[-1], "search"), flush=True)
        return sorted(rows, key=lambda row: (row["bytes_per_token"], kl_of(row["search"])))

    def tables(self, anchor: Mapping[str, Any]) -> tuple[list[LayerTable], dict[str, Any] | None]:
        """Tables that passed on the search half or may yet, as with pairs, fewest bytes first, and the record
        of their search."""
        search = LayerSearch(
            self.target, self.space, self.settings, evaluator=self.evaluator, pace=self.pace, rng=self.rng,
            left_s=lambda: UNBOUNDED_S, say=lambda text: print(f"  {text}", flush=True),
        )  # fmt: skip
        found = search.run(anchor)
        best = found.passing[0].config if found.passing else anchor
        tables = sorted((t for t in found.tables if may_pass(t.quality)), key=lambda t: t.num_bytes)
        return tables, layer_record(self.target, found, best, context=CONTEXT)

    # -- confirmation half

    def record(self, level: float) -> None:
        """The baseline's answers; as many probes as the margin needs at the smallest error of a candidate."""
        chosen = choose_for_quality(self.confirm, self.args.confirm_requests, self.rng)
        with self.target.start(self.space.baseline, kv_budget_bytes=self.args.kv_budget) as running:
            reference = record_reference(running, chosen, ReplaySettings())
            self.gate = ask_baseline(
                running, reference, self.questions, margin=self.margin, aa_chunk=96, error=level
            )

    def confirmed(self, config: Mapping[str, Any], error: float) -> dict[str, Any]:
        with self.target.start(config, kv_budget_bytes=self.args.kv_budget) as running:
            quality, _ = judge_candidate(
                running, self.gate, is_lossy=self.space.is_lossy(config), rng=np.random.default_rng(0),
                error=error,
            )  # fmt: skip
        return brief(quality.to_dict()) | {"error": error}


def brief(quality: Mapping[str, Any]) -> dict[str, Any]:
    metrics = quality.get("metrics", {})
    return {
        "verdict": quality["verdict"], "reason": quality["reason"],
        "num_requests": quality.get("num_requests"),
        "metrics": {name: metric["excess"] for name, metric in metrics.items()},
    }  # fmt: skip


def kl_of(found: Mapping[str, Any]) -> float:
    return float(found["metrics"].get("kl", {}).get("value") or 0.0)


def label(config: Mapping[str, Any]) -> str:
    table = format_layer_codecs(config.get("layer_codecs", {}))
    return f"{config['k_codec']}/{config['v_codec']}" + (f", {table}" if table else "")


def line(row: Mapping[str, Any], half: str) -> str:
    found = row[half]
    kl = found["metrics"].get("kl", {})
    shown = "" if not kl else f"KL {kl['value']:.3g} <= {kl['high']:.3g}  "
    return (
        f"  {half:8} {row['bytes_per_token']:7.0f} B/token  {label(row['config']):44} {found['verdict']:9} "
        f"{shown}{found['reason']}"
    )


def first_passing(study: Study, rows: Sequence[dict[str, Any]], shared: SharedError | None) -> Any:
    """The first row, by bytes, that passes on the confirmation half; each tried row gets its verdict."""
    for index, row in enumerate(rows):
        row["confirm"] = study.confirmed(row["config"], 0.05 if shared is None else shared.level(index))
        print(line(row, "confirm"), flush=True)
        if row["confirm"]["verdict"] == "PASS":
            return row
    return None


def measure(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    study = Study(model, args)
    pairs = study.pairs()
    passing = [row for row in pairs if row["search"]["verdict"] == "PASS"]
    anchor = passing[0]["config"] if passing else study.space.baseline
    found, layers = study.tables(anchor)
    tables = [
        {"config": dict(t.config), "bytes_per_token": t.num_bytes, "search": brief(t.quality)} for t in found
    ]
    shared = SharedError(max(1, len(tables)))
    study.record(min(shared.level(i) for i in range(max(1, len(tables)))))
    pair = first_passing(study, [r for r in pairs if r["search"]["verdict"] != "FAIL"], None)
    table = first_passing(study, tables, shared)
    ratio = table["bytes_per_token"] / pair["bytes_per_token"] if pair and table else None
    return {
        "pairs": pairs, "tables": tables, "layers": layers, "best_pair": pair, "best_table": table,
        "ratio": ratio, "held": ratio is not None and ratio <= WANTED, "margin": study.margin.to_dict(),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="model folder; default the reference model")
    parser.add_argument("--variant", action="append", choices=("model", *sorted(VARIANTS)),
                        help="default: the model itself and every variant")  # fmt: skip
    parser.add_argument("--requests", type=int, default=720)
    parser.add_argument("--search-requests", type=int, default=96)
    parser.add_argument("--confirm-requests", type=int, default=256)
    parser.add_argument("--probe-margin", type=float, default=0.05)
    parser.add_argument("--kv-budget", type=int, default=256 << 20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few requests: does it run, not is it true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.requests, args.search_requests, args.confirm_requests = 120, 24, 48
    return args


def main() -> int:
    args = arguments()
    model = args.model or reference_model_path()
    out = new_record(args)
    for name, folder in model_folders(model, args.variant or ("model", *sorted(VARIANTS))):
        found = measure(folder, args)
        out["models"][name] = found
        if found["ratio"] is None:
            print("  nothing to compare: no pair or no table passed")
        else:
            word = "held  " if found["held"] else "FAILED"
            print(
                f"  {word} {found['ratio']:.3f}x: {label(found['best_table']['config'])} against "
                f"{label(found['best_pair']['config'])}"
            )
        if args.json is not None:
            args.json.write_text(json.dumps(out, indent=1) + "\n")
    return 0 if any(found["held"] for found in out["models"].values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KVTuneError as error:
        sys.exit(f"bench_allocation: {error}")
