"""Continuous batching over the paged cache, without tensors: one `Scheduler`, engine and simulator alike."""

from kvtune.sched.records import SchedulerStats, SequenceUpdate, StepUpdates
from kvtune.sched.scheduler import Scheduler
from kvtune.sched.sequence import SequenceView

__all__ = ["Scheduler", "SchedulerStats", "SequenceUpdate", "SequenceView", "StepUpdates"]
