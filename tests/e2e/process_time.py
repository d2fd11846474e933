"""CPU time of child processes, and how long one may take to start beside `import numpy`."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping

IDLE_NUMPY_S = 0.086
"""CPU time of `import numpy` on an idle machine (benchmarks/results/bench_start.json)."""


def cpu_seconds(*arguments: str, env: Mapping[str, str] | None = None) -> float:
    """User and system time of one interpreter: what a busy machine blurs least."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, timeout=60, check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def assert_starts_within(seconds: float, *arguments: str, env: Mapping[str, str] | None = None) -> None:
    """At most `seconds` of CPU time over numpy; where numpy itself starts slower, so may the rest."""
    times = [(cpu_seconds("-c", "import numpy", env=env), cpu_seconds(*arguments, env=env)) for _ in range(4)]
    bare, whole = (min(column) for column in zip(*times, strict=True))
    assert whole - bare < seconds * max(1.0, bare / IDLE_NUMPY_S), times
