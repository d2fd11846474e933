"""How much of the distance from LRU to the offline optimum each eviction policy closes, on real traces.

    KVTUNE_TRACES=DIR python benchmarks/bench_eviction.py [--only SUBSTRING] [--limit N] [--json OUT]

Every trace of the folder with block identity, at the capacities of its expected.json, or at 0.1, 0.5, 1, 5,
10, 25 and 50 % of its distinct blocks. Per trace: the sum of (policy - LRU) over the sum of (pinned optimum -
LRU) hits, over capacities where these two are at least one point of all references apart; and the worst loss
against LRU at any capacity, in points. Constants of the learned policies were chosen on one trace, marked
`chosen on`; the mean without it stands beside the mean. Where a policy loses to LRU is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtune.cache.replay import DEFAULT_POLICY, Replayer
from kvtune.cache.replay_study import default_capacities
from kvtune.errors import UsageError
from kvtune.workload import block_trace, load_workload

CHOSEN_ON = "mooncake_conversation.jsonl.gz"
POLICIES = ("gdsf", "hazard", "guarded")
ORACLE = "optimal_pinned"
SMALLEST_GAP = 0.01
BARS = {"mean": 0.08, "conversation": 0.12, "worst_points": -0.5}


@dataclass(frozen=True)
class Row:
    """Hit blocks at one capacity; `points`: policy - LRU in points of all references."""

    capacity: int
    lru: int
    opt_pinned: int
    hits: dict[str, int]
    points: dict[str, float]
    counts: bool


@dataclass(frozen=True)
class TraceResult:
    """`share`: of the gap closed, None where no capacity has a gap of one point."""

    trace: str
    is_chosen_on: bool
    block_size: int
    references: int
    unique: int
    rows: list[Row]
    share: dict[str, float | None]
    worst_points: dict[str, float]


def replayer_of(path: Path, block_size: int | None, limit: int | None) -> Replayer | None:
    """None, said on stderr, for files that are no trace or hold no block identity."""
    try:
        workload = load_workload(path, trace_block_size=block_size, limit=limit)
        return Replayer(block_trace(workload, block_size))
    except UsageError as error:
        print(f"left out: {path.name}: {error}", file=sys.stderr)
        return None


def row_of(replayer: Replayer, capacity: int, policies: Sequence[str]) -> Row:
    total = replayer.trace.num_references
    hits = {p: replayer.replay(p, capacity).blocks_hit for p in ("lru", ORACLE, *policies)}
    lru, oracle = hits.pop("lru"), hits.pop(ORACLE)
    points = {policy: 100 * (hit - lru) / total for policy, hit in hits.items()}
    return Row(capacity, lru, oracle, hits, points, oracle - lru >= SMALLEST_GAP * total)


def measure(path: Path, expected: dict[str, Any] | None, arguments: argparse.Namespace) -> TraceResult | None:
    replayer = replayer_of(path, expected["block_size"] if expected else None, arguments.limit)
    if replayer is None:
        return None
    trace = replayer.trace
    if expected:
        capacities = [int(capacity) for capacity in expected["hit_blocks"]]
    else:
        capacities = list(default_capacities(trace.num_unique))
    rows: list[Row] = []
    for capacity in capacities:
        rows.append(row_of(replayer, capacity, arguments.policies))
        print(f"{path.name}: {capacity:,} blocks", file=sys.stderr)
    counted = [row for row in rows if row.counts]
    gap = sum(row.opt_pinned - row.lru for row in counted)
    return TraceResult(
        trace=path.name,
        is_chosen_on=path.name == CHOSEN_ON,
        block_size=trace.block_size,
        references=trace.num_references,
        unique=trace.num_unique,
        rows=rows,
        share={p: sum(r.hits[p] - r.lru for r in counted) / gap if gap else None for p in arguments.policies},
        worst_points={p: min(row.points[p] for row in rows) for p in arguments.policies},
    )


def print_trace(result: TraceResult, policies: Sequence[str]) -> None:
    chosen = ", constants chosen on it" if result.is_chosen_on else ""
    print(f"\n{result.trace}: {result.references:,} references, {result.unique:,} blocks{chosen}")
    print(f"{'blocks':>9}{'lru %':>8}{'opt %':>8}" + "".join(f"{p:>9}{'gap':>7}" for p in policies))
    for row in result.rows:
        line = f"{row.capacity:>9,}"
        line += "".join(f"{100 * hits / result.references:>8.2f}" for hits in (row.lru, row.opt_pinned))
        gap = row.opt_pinned - row.lru
        for policy in policies:
            share = f"{(row.hits[policy] - row.lru) / gap:.0%}" if row.counts else "-"
            line += f"{row.points[policy]:>+9.2f}{share:>7}"
        print(line)
    for policy in policies:
        share = result.share[policy]
        closed = "no gap of a point" if share is None else f"closes {share:.1%} of the gap"
        print(f"  {policy}: {closed}, worst {result.worst_points[policy]:+.2f} points")


def mean_share(results: Sequence[TraceResult], policy: str) -> float | None:
    shares = [share for result in results if (share := result.share[policy]) is not None]
    return sum(shares) / len(shares) if shares else None


def summary(results: Sequence[TraceResult], policies: Sequence[str]) -> dict[str, Any]:
    """Per policy: means over traces, the worst loss, and every place where LRU would have been better."""
    others = [result for result in results if not result.is_chosen_on]
    return {
        policy: {
            "mean_share": mean_share(results, policy),
            "mean_share_without_chosen_on": mean_share(others, policy),
            "worst_points": min(result.worst_points[policy] for result in results),
            "losses": [
                {"trace": result.trace, "capacity": row.capacity, "points": round(row.points[policy], 3)}
                for result in results
                for row in result.rows
                if row.points[policy] < 0
            ],
        }
        for policy in policies
    }


def print_summary(by_policy: dict[str, Any]) -> None:
    def share(value: float | None) -> str:
        return "none" if value is None else f"{value:.1%}"

    print()
    for policy, found in by_policy.items():
        print(
            f"{policy}: mean {share(found['mean_share'])}, without the trace its constants were chosen on "
            f"{share(found['mean_share_without_chosen_on'])}; worst {found['worst_points']:+.2f} points; "
            f"below LRU at {len(found['losses'])} capacities"
        )
        for loss in sorted(found["losses"], key=lambda loss: loss["points"])[:5]:
            print(f"    {loss['points']:+.3f} points: {loss['trace']} at {loss['capacity']:,}")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--traces", type=Path, default=os.environ.get("KVTUNE_TRACES"), help="folder of traces"
    )
    parser.add_argument("--only", default="", help="only files whose name contains this")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--limit", type=int, help="only the first N requests of each trace")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.traces is None:
        parser.error("name the folder of traces: --traces DIR or KVTUNE_TRACES=DIR")
    return arguments


def main() -> int:
    arguments = parsed_arguments()
    folder = Path(arguments.traces)
    known = folder / "expected.json"
    expected = json.loads(known.read_text()) if known.is_file() else {}
    results: list[TraceResult] = []
    for path in sorted(folder.iterdir()):
        is_trace = path.is_file() and path.suffix != ".md" and path.name != known.name
        if is_trace and arguments.only in path.name:
            result = measure(path, expected.get(path.name), arguments)
            if result is not None:
                print_trace(result, arguments.policies)
                results.append(result)
    if not results:
        print(f"no trace with block identity in {folder}", file=sys.stderr)
        return 2
    by_policy = summary(results, arguments.policies)
    print_summary(by_policy)
    if arguments.json:
        record = {
            "benchmark": "eviction",
            "chosen_on": CHOSEN_ON,
            "default_policy": DEFAULT_POLICY,
            "bars": BARS,
            "limit": arguments.limit,
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "python": platform.python_version(),
            },
            "summary": by_policy,
            "traces": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
