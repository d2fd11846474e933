"""Timing that can be trusted on a shared machine: probes around cells, rounds in turn, limits beside results.

A cell times several calls (ours and the peers) in one process. Every round runs each call once, starting one
later than the round before, so that drift of the machine hits all alike. Before and after a cell a probe
asks whether the machine is quiet: with several threads, how long it takes them to meet at a barrier (a
neighbour on one core makes every meeting last a scheduler slice); with one, which share of the wall clock the
thread got. A cell between noisy probes is repeated, and dropped if it stays noisy. With one thread the clock
is the thread's CPU time, which leaves out the time slices of other processes (not their cache and bandwidth
use); with more it is wall time. The limit of a result is what the same threads reach reading a buffer (bytes)
or multiplying matrices (products) in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

Call = Callable[[], object]
Clock = Callable[[], float]

PROBE_MEETINGS = 200
STALL_S = 1e-3
"""A meeting of threads that takes this long waited for a scheduler slice; a quiet one takes some 10 us."""
MAX_STALLED_SHARE = 0.02
MIN_CPU_SHARE = 0.9


class Elsewhere:
    """A process that answers each JSON object, one a line, by another; use as a context manager.

    The process says something once it is ready. What it logs is shown if it ends before it was told to.
    SystemExit then. A measured call that returns its answer counts by the answer's `seconds`: see `measure`.
    """

    def __init__(self, name: str, command: Sequence[str | Path], threads: int, **environment: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
        )  # fmt: skip
        self._answer()

    def ask(self, **order: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; why is in its log
            print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._wait()
            self._log.seek(0)
            said = self._log.read()[-3000:]
            self.close()
            raise SystemExit(f"{self.name} ended:\n{said}")
        return json.loads(line)

    def close(self) -> None:
        """Close its input and wait for it; one that does not end by itself is killed."""
        self._wait()
        self._log.close()

    def _wait(self) -> None:
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        except BrokenPipeError:
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Probe:
    """What the machine looked like at one moment.

    `cpu_share`: CPU time over wall time of one busy thread. `meeting_us`: median time for all threads to meet
    (None with one thread); `stalled_share`: meetings that took longer than STALL_S.
    """

    load_average: float
    cpu_share: float
    meeting_us: float | None
    stalled_share: float

    @property
    def is_quiet(self) -> bool:
        if self.meeting_us is None:
            return self.cpu_share >= MIN_CPU_SHARE
        return self.stalled_share <= MAX_STALLED_SHARE


@dataclass(frozen=True)
class Limit:
    """What the same threads reach here a second: bytes read, bf16 multiplications and additions."""

    read_gb_per_s: float
    product_gflop_per_s: float

    def seconds(self, num_bytes: float, flop: float) -> float:
        """The least time for work that must read that much and multiply that much."""
        return max(num_bytes / self.read_gb_per_s, flop / self.product_gflop_per_s) / 1e9


@dataclass(frozen=True)
class Cell:
    """Seconds per round of every call, between two probes. `attempts`: cells measured until one was quiet."""

    times: dict[str, list[float]]
    before: Probe
    after: Probe
    attempts: int

    @property
    def is_quiet(self) -> bool:
        return self.before.is_quiet and self.after.is_quiet

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def spread(self, name: str) -> tuple[float, float]:
        """First and third quartile."""
        low, _, high = statistics.quantiles(self.times[name], n=4)
        return low, high

    def best(self, names: list[str]) -> str:
        """The fastest of some calls, by median."""
        return min(names, key=self.median)


def clock_for(threads: int) -> Clock:
    return time.thread_time if threads == 1 else time.perf_counter


def probe(threads: int) -> Probe:
    """Look at the machine now, for about 10 ms when it is quiet."""
    start, start_cpu = time.perf_counter(), time.thread_time()
    x = torch.ones(1 << 18)
    while time.thread_time() - start_cpu < 0.005:
        x.sum()
    share = (time.thread_time() - start_cpu) / (time.perf_counter() - start)
    meetings = [_meeting(threads) for _ in range(PROBE_MEETINGS)] if threads > 1 else []
    return Probe(
        load_average=round(os.getloadavg()[0], 2),
        cpu_share=round(min(1.0, share), 3),
        meeting_us=round(statistics.median(meetings) * 1e6, 1) if meetings else None,
        stalled_share=sum(m > STALL_S for m in meetings) / len(meetings) if meetings else 0.0,
    )


def _meeting(threads: int) -> float:
    """One parallel region of torch over a buffer just large enough to be shared by all its threads."""
    x = torch.ones(threads << 15)  # torch gives each thread at least 32,768 elements
    start = time.perf_counter()
    x.neg_()
    return time.perf_counter() - start


def measure(calls: dict[str, Call], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of `rounds` rounds of every call, warmed up once, the first one rotating.

    A call that returns a dict ran `Elsewhere`: its seconds there count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for _, call in order:
        call()
    for i in range(rounds):
        for name, call in order[i % len(order) :] + order[: i % len(order)]:
            start = clock()
            result = call()
            seconds = clock() - start
            times[name].append(result["seconds"] if isinstance(result, dict) else seconds)
    return times


def measure_cell(calls: dict[str, Call], rounds: int, threads: int, attempts: int = 3) -> Cell:
    """Measure until both probes are quiet, `attempts` times at most; the last cell comes back either way."""
    for attempt in range(1, attempts + 1):
        before = probe(threads)
        times = measure(calls, rounds, clock_for(threads))
        cell = Cell(times, before, probe(threads), attempt)
        if cell.is_quiet:
            break
    return cell


def measure_limit(threads: int, num_bytes: int = 768 << 20) -> Limit:
    """Read a float32 buffer of `num_bytes` (by default more than an L3); multiply bf16 matrices."""
    clock = clock_for(threads)
    buffer = torch.ones(num_bytes // 4)
    a, b = torch.randn(2, 1024, 1024).to(torch.bfloat16).unbind(0)
    times = measure({"read": buffer.sum, "product": lambda: a @ b}, 5, clock)
    return Limit(
        round(num_bytes / min(times["read"]) / 1e9, 2),
        round(2 * 1024**3 / min(times["product"]) / 1e9, 1),
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def l3_size() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return path.read_text().strip() if path.is_file() else "unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every kernel benchmark has."""
    parser.add_argument("--quick", action="store_true", help="few cells, few rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="one set of cells for each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--attempts", type=int, default=3, help="tries of a cell until the machine is quiet")
    parser.add_argument(
        "--keep-noisy", action="store_true", help="report cells measured on a busy machine too, marked"
    )
    parser.add_argument("--json", type=Path, help="write the result here")


class Recorder:
    """Runs cells at every thread count, prints them, and writes the JSON of a whole benchmark."""

    def __init__(self, title: str, args: argparse.Namespace, kernels: str) -> None:
        self._args, self._rounds = args, 5 if args.quick else args.rounds
        self._result = {
            "benchmark": title,
            "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs, L3 {l3_size()}",
            "kernels": kernels,
            "torch": torch.__version__,
            "rounds": self._rounds,
            "load_average_before": round(os.getloadavg()[0], 2),
            "limits": {},
            "cells": [],
            "dropped": [],
        }
        print(f"{self._result['hardware']}; {kernels}; torch {torch.__version__}; {self._rounds} rounds")

    def threads(self) -> Iterator[tuple[int, Limit]]:
        """Each thread count asked for, set in torch, with its limits."""
        for threads in self._args.threads:
            torch.set_num_threads(threads)
            limit = measure_limit(threads)
            self._result["limits"][str(threads)] = asdict(limit)
            print(
                f"\n{threads} thread(s), clock {clock_for(threads).__name__}: "
                f"reads {limit.read_gb_per_s} GB/s, multiplies {limit.product_gflop_per_s} GFLOP/s in bf16"
            )
            yield threads, limit

    def cell(
        self,
        facts: dict[str, object],
        calls: dict[str, Call],
        work: dict[str, tuple[float, float]],
        peers: list[str],
        threads: int,
        limit: Limit,
    ) -> None:
        """Measure and record one cell. `work`: (bytes to read, flop) by call.

        Ratios are against the fastest of `peers`, names among the calls.
        """
        cell = measure_cell(calls, self._rounds, threads, self._args.attempts)
        entry: dict = {**facts, "threads": threads, "attempts": cell.attempts, "is_quiet": cell.is_quiet}
        entry["probes"] = [asdict(cell.before), asdict(cell.after)]
        print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        if not cell.is_quiet and not self._args.keep_noisy:
            self._result["dropped"].append(entry)
            print(f"  dropped: the machine was busy in {cell.attempts} attempts ({cell.before})")
            self._keep()
            return
        best = cell.best(peers)
        entry["best_peer"] = best
        entry["ms"] = {name: _line(cell, name, best, work[name], limit) for name in calls}
        self._result["cells"].append(entry)
        for name, m in entry["ms"].items():
            print(
                f"  {name:17} {m['median']:9.2f} ms  iqr {m['iqr'][0]:.2f}..{m['iqr'][1]:.2f}  "
                f"{m['gb_per_s']:6.1f} GB/s {m['gflop_per_s']:6.0f} GFLOP/s  limit {m['limit_ms']:.2f} ms "
                f"({m['share_of_limit']:.0%})  x{m['speedup']:.2f} {best}"
            )
        self._keep()

    def finish(self) -> None:
        self._result["load_average_after"] = round(os.getloadavg()[0], 2)
        self._keep()

    def _keep(self) -> None:
        if self._args.json:
            self._args.json.write_text(json.dumps(self._result, indent=1) + "\n")


def _line(cell: Cell, name: str, best_peer: str, work: tuple[float, float], limit: Limit) -> dict:
    median, (low, high), least = cell.median(name), cell.spread(name), limit.seconds(*work)
    return {
        "median": round(median * 1e3, 3),
        "iqr": [round(low * 1e3, 3), round(high * 1e3, 3)],
        "mb": round(work[0] / 1e6, 1),
        "gflop": round(work[1] / 1e9, 2),
        "gb_per_s": round(work[0] / median / 1e9, 2),
        "gflop_per_s": round(work[1] / median / 1e9, 1),
        "limit_ms": round(least * 1e3, 3),
        "share_of_limit": round(least / median, 3),
        "speedup": round(cell.median(best_peer) / median, 3),
    }
