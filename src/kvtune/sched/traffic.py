"""What the parts of the scheduler share: who runs, who waits, and by which settings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.sched.lowering import Lowering
from kvtune.sched.peak_admission import PeakAdmission
from kvtune.sched.queue import WaitingQueue
from kvtune.sched.running import RunningSequences

__all__ = ["Traffic"]


@dataclass(slots=True)
class Traffic:
    """Of one scheduler. `config` is the one in force; `counts` are the counters of `SchedulerStats`."""

    manager: KVCacheManager
    config: SchedulerConfig
    running: RunningSequences
    lowering: Lowering
    peak: PeakAdmission
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    counts: Counter[str] = field(default_factory=Counter[str])
