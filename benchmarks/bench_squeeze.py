"""Half of the KV budget goes away during a run: preempting against reversible precision.

    python benchmarks/bench_squeeze.py [--margin balanced] [--loads 0.3,0.4,0.5] [--json OUT]

Both arms serve the same generated chats from the bundled model with keys and values in `n8_rh`, at the same
Poisson arrivals, each asking for half to one and a half of `--output` tokens. Only one may drop low planes,
and only of layers and sides whose 4-bit reading, all of it at once, passed the gate's replay on other chats
(chosen on some, judged on others: `kvtune tune --squeeze` does the same).
The budget is halved when a quarter of the requests have come and given back after three quarters.

Everything that could favour an arm is fixed before either runs, in this order:

1. The SLO: twice the p95 TTFT and TPOT of requests that run alone.
2. The rate: `--pace` (0.8) of what the largest batch of IN_FLIGHT yields whose requests, 95 % of them, keep
   the SLO in a closed loop with memory to spare.
3. What requests hold: bytes of referenced blocks, shared ones once, mean over the time in which half would
   be gone, in open-loop runs of the same arrivals with memory to spare. A budget of `load` is that over
   `load`.
4. The load that decides: the highest of `--loads` at which the full budget, never halved, holds 95 % of the
   requests (median of the repetitions). The other loads are run once and shown: far below it halving hurts
   nobody, above it the budget was too small before it was halved.

Goodput: requests within the SLO per second of the whole run. Seconds are those of this process's CPU (one
thread) unless `--clock` says otherwise; `steady-cpu` counts them at the machine's speed of the moment, for
machines whose neighbours come and go. Bits are checked apart (`squeeze_bits.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clocks import clock_named
from squeeze_bits import BITS_KEPT, check_bits
from squeeze_serving import (
    HELD,
    NESTED,
    SPARE,
    Arrival,
    Run,
    Slo,
    alone,
    arrivals,
    chats,
    engine_of,
    fastest_rate,
    running,
    serve,
    warm,
)

from kvtune import SchedulerConfig
from kvtune.config import format_bytes
from kvtune.engine import LoadedModel, load_model
from kvtune.errors import KVTuneError
from kvtune.quality import (
    Gate,
    QualityVerdict,
    ReplaySettings,
    margin_named,
    record_reference,
)
from kvtune.testing.reference import reference_model_path
from kvtune.tune.squeeze import PlaneProof, SqueezeProof
from kvtune.workload import TokenRequest

FULL, PREEMPTING, REVERSIBLE = ARMS = ("full", "preempting", "reversible")
WANTED = 1.3
Planes = dict[int, tuple[int, int]]


@dataclass
class Point:
    """All runs at one load."""

    load: float
    budget_bytes: int
    runs: dict[str, list[Run]] = field(default_factory=lambda: {arm: [] for arm in ARMS})

    @property
    def share_held(self) -> float:
        """Of the full budget's requests, median of its runs."""
        return statistics.median(r.held / r.num_requests for r in self.runs[FULL])

    @property
    def ratios(self) -> list[float]:
        """Goodput, reversible over preempting, pair by pair."""
        pairs = zip(self.runs[REVERSIBLE], self.runs[PREEMPTING], strict=True)
        return [a.goodput / b.goodput if b.goodput else float("inf") for a, b in pairs]

    def to_dict(self) -> dict[str, Any]:
        goodput = {arm: statistics.median(r.goodput for r in runs) for arm, runs in self.runs.items() if runs}
        return {
            "load": self.load, "budget_bytes": self.budget_bytes, "share_held_by_full": self.share_held,
            "goodput": goodput, "ratio": statistics.median(self.ratios), "ratios": self.ratios,
            "runs": {arm: [asdict(run) for run in runs] for arm, runs in self.runs.items()},
        }  # fmt: skip


# --- what may be read


def prove(
    loaded: LoadedModel, args: argparse.Namespace, search: Sequence[TokenRequest],
    unseen: Sequence[TokenRequest],
) -> SqueezeProof:  # fmt: skip
    """As `tune --squeeze`: sides by what each loses alone, the largest set that likely passes on `search`,
    judged on `unseen`; two thirds of it where that fails."""
    margin = margin_named(args.margin)
    with running(engine_of(loaded, args, kv_budget=SPARE), args) as baseline:
        references = [
            record_reference(baseline, requests, ReplaySettings(num_decode=0), num_decode=0)
            for requests in (search, unseen)
        ]
    sides = [(layer.index, side) for layer in loaded.spec.layers for side in "kv"]
    with running(engine_of(loaded, args, kv_budget=SPARE, **NESTED), args) as nested:
        return PlaneProof(
            nested, search=references[0], gate=Gate(reference=references[1], margin=margin),
            rng=np.random.default_rng(args.seed),
        ).prove(sides)  # fmt: skip


# --- all loads


class Arms:
    """Runs arms at loads; every repetition has arrivals of its own, the same for all arms and loads."""

    def __init__(
        self, loaded: LoadedModel, streams: Sequence[Sequence[Arrival]], slo: Slo, planes: Planes,
        args: argparse.Namespace, note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._loaded, self._streams, self._slo = loaded, streams, slo
        self._planes, self._args, self._note = planes, args, note

    def run(self, arm: str, repetition: int, budget: int | str) -> Run:
        cache: dict[str, Any] = {"kv_budget": budget, **NESTED}
        if arm == REVERSIBLE:
            cache |= {"squeeze_planes": self._planes, "plane_arena": self._args.arena or budget}
        with engine_of(self._loaded, self._args, **cache) as engine:
            return serve(engine, self._streams[repetition], self._slo, self._args, is_halved=arm != FULL)

    def held(self) -> list[Run]:
        """Every repetition with memory to spare."""
        return [self.run(FULL, i, SPARE) for i in range(len(self._streams))]

    def full(self, point: Point) -> bool:
        """Run the full budget; whether it holds enough. Ends early once the median cannot."""
        most = len(self._streams)
        for i in range(most):
            self._add(point, FULL, i)
            too_few = [r for r in point.runs[FULL] if r.held < HELD * r.num_requests]
            if 2 * len(too_few) > most:
                return False
        return point.share_held >= HELD

    def compare(self, point: Point, repetitions: int) -> None:
        if not point.runs[FULL]:
            self._add(point, FULL, 0)
        for i in range(repetitions):
            for arm in (PREEMPTING, REVERSIBLE) if i % 2 == 0 else (REVERSIBLE, PREEMPTING):
                self._add(point, arm, i)

    def _add(self, point: Point, arm: str, repetition: int) -> None:
        run = self.run(arm, repetition, point.budget_bytes)
        point.runs[arm].append(run)
        self._note(f"load {point.load} {describe(arm, asdict(run))}")


def measure(loaded: LoadedModel, args: argparse.Namespace, model: Path, note: Callable[[str], None]):
    span = {"shortest": args.shortest, "longest": args.longest}
    if args.planes is None:
        search, unseen = (chats(loaded, model, args.samples, seed=args.seed + i, **span) for i in (1, 2))
        proof = prove(loaded, args, search, unseen)
    else:
        proof = SqueezeProof(planes={int(k): (v[0], v[1]) for k, v in args.planes.items()})
    planes, verdict = proof.planes, proof.quality
    note(f"proven at {args.margin}: {planes or 'nothing'}")
    requests = chats(loaded, model, args.requests, seed=args.seed, **span)
    with engine_of(loaded, args, kv_budget=SPARE, **NESTED) as engine:
        warm(engine, requests)
        slo = alone(engine, requests[: args.unloaded], args)
    fastest, batches = fastest_rate(loaded, requests, slo, args)
    rate = args.pace * fastest
    note(f"SLO {asdict(slo)}; batches {batches}; {rate:.2f} requests/s")
    seeds = range(args.seed, args.seed + args.repetitions)
    streams = [arrivals(requests, rate, args.output, seed=seed) for seed in seeds]
    arms = Arms(loaded, streams, slo, planes, args, note)
    spare = arms.held()
    held = statistics.mean(run.mean_held_bytes for run in spare)
    points = [Point(load, int(held / load)) for load in sorted(args.loads, reverse=True)]
    decisive = next((point for point in points if arms.full(point)), None)
    for point in points:
        arms.compare(point, args.repetitions if point is decisive else 1)
    bits = None
    if planes:
        bits = check_bits(
            model, planes, requests[: args.bits_requests], share=args.bits_share,
            batched_tokens=args.batched_tokens, kernel=args.kernel,
        )  # fmt: skip
    return {
        "schema_version": 2,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "time"},
        "slo": asdict(slo), "batches": batches, "requests_per_s": rate, "held_bytes": held,
        "spare": [asdict(run) for run in spare],
        "margin": margin_named(args.margin).to_dict(),
        "planes": {str(layer): list(pair) for layer, pair in planes.items()},
        "share_of_sides": share_of_sides(planes, loaded),
        "verdict": None if verdict is None else verdict.to_dict(),
        "isolated": [{"layer": n, "side": side, "isolated_kl": kl} for (n, side), kl in proof.sides],
        "points": [point.to_dict() for point in points],
        "decisive_load": None if decisive is None else decisive.load,
        "wanted": WANTED, "bits": bits, "passed": passed(points, decisive, verdict, bits),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def share_of_sides(planes: Planes, loaded: LoadedModel) -> float:
    return sum((k == 1) + (v == 1) for k, v in planes.values()) / (2 * len(loaded.spec.layers))


def passed(
    points: Sequence[Point], decisive: Point | None, verdict: QualityVerdict | None, bits: Any
) -> dict[str, bool]:
    runs = [run for point in points for arm in ARMS for run in point.runs[arm]]
    reversible = [run for point in points for run in point.runs[REVERSIBLE]]
    return {
        "all_finished": all(run.finished == run.num_requests for run in runs),
        "goodput": decisive is not None and statistics.median(decisive.ratios) >= WANTED,
        "quality": verdict is not None,
        "full_precision_afterwards": all(run.lowered_again == 0 for run in reversible),
        "within_budget": all(run.peak_over_budget_bytes <= 0 for run in reversible),
        **{name: bits is not None and bits[name] for name in BITS_KEPT},
    }


def describe(arm: str, run: Mapping[str, Any]) -> str:
    return (
        f"{arm:10} goodput {run['goodput']:.3f}/s  held {run['held']}/{run['num_requests']}"
        f" (squeezed {run['squeezed_held']}/{run['squeezed']})  TTFT p95 {run['ttft_p95_s']:.3f} s"
        f"  TPOT p95 {1000 * run['tpot_p95_s']:.1f} ms  running {run['mean_running']:.1f}"
        f"  preempted {run['preemptions']}  lowered {run['lowered_requests']}"
    )


def show(report: dict[str, Any]) -> None:
    print(f"planes that may go: {report['planes'] or 'none'}; {report['requests_per_s']:.2f} requests/s")
    for point in report["points"]:
        mark = "decides" if point["load"] == report["decisive_load"] else ""
        held = point["share_held_by_full"]
        print(
            f"load {point['load']:.2f}  budget {format_bytes(point['budget_bytes'])}  full holds {held:.1%}"
            f"  goodput ratio {point['ratio']:.2f}  {mark}"
        )
        for arm, runs in point["runs"].items():
            for run in runs:
                print("   " + describe(arm, run))
    print(f"bits {report['bits']}")
    print("passed: " + ", ".join(f"{name} {ok}" for name, ok in report["passed"].items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--margin", default="balanced", help="near-lossless, balanced or aggressive")
    parser.add_argument("--planes", type=json.loads, default=None, help='skip the proof, e.g. {"3": [2, 1]}')
    parser.add_argument(
        "--loads", type=lambda text: [float(x) for x in text.split(",")],
        default=[0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7],
        help="shares of the full budget that requests hold on average",
    )  # fmt: skip
    parser.add_argument("--pace", type=float, default=0.8, help="of the fastest rate within the SLO")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--output", type=int, default=384, help="mean tokens generated by each request")
    parser.add_argument("--shortest", type=int, default=256)
    parser.add_argument("--longest", type=int, default=768)
    parser.add_argument(
        "--samples", type=int, default=48, help="chats the reading is chosen on, and as many it is judged on"
    )
    parser.add_argument("--unloaded", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batched-tokens", type=int, default=256)
    parser.add_argument("--watermark", type=float, default=SchedulerConfig().watermark)
    parser.add_argument("--admission", default=SchedulerConfig().admission, help="of all arms")
    parser.add_argument("--arena", default=None, help="host arena; default: as large as the budget")
    parser.add_argument("--bits-requests", type=int, default=6)
    parser.add_argument("--bits-share", type=float, default=0.9, help="of what is referenced at the squeeze")
    parser.add_argument("--kernel", default="auto", help="of the bit checks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("cpu", "steady-cpu", "wall"), default="cpu", help="whose seconds count"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else str(value)


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    args.time = clock_named(args.clock)
    model = args.model or reference_model_path()

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        report = measure(load_model(model), args, model, note)
    except KVTuneError as error:
        note(f"bench_squeeze: {error}")
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, default=_plain) + "\n")
    show(report)
    return 0 if all(report["passed"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
