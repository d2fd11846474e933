"""When dropped low planes come back: first for requests that hit their blocks, then as room allows.

A request that is admitted at full precision onto blocks whose planes rest in the host arena waits for them,
pinned, while others run; a limit per step keeps their token intervals even. If room runs out meanwhile it
starts on what is there: below nominal precision, and publishing nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.sched.sequence import Sequence
from kvtune.types import PlaneCause

__all__ = ["PlaneRestores"]

_UNLIMITED = 1 << 60


class PlaneRestores:
    """The planes that come back in one step. Written by `Scheduler` alone."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._precision = manager.precision
        self._left = 0
        self._reserve = 0.0

    def begin(self, running: Iterable[Sequence], config: SchedulerConfig, *, is_relieved: bool) -> None:
        """A step begins. `is_relieved`: nobody waits for room, so that what is spare may serve precision."""
        running = list(running)
        has_decoders = any(not s.awaits_planes for s in running)
        self._left = config.restore_blocks_per_step if has_decoders else _UNLIMITED
        self._reserve = config.watermark
        for sequence in running:
            if sequence.awaits_planes:
                self.await_planes(sequence)
        if is_relieved and self._left and self._precision.has_resting:
            self._relieve(running, config)

    def await_planes(self, sequence: Sequence) -> bool:
        """Bring planes back for a request that was admitted to have them all; True while some are missing.
        It waits no longer once there is no room for the next one."""
        missing = self._precision.num_resting(sequence.request_id)
        restored = 0
        if missing and self._left:
            restored = self._restore(sequence, PlaneCause.HIT, self._reserve)
        is_possible = restored > 0 or not self._left
        sequence.awaits_planes = missing > restored and is_possible
        return sequence.awaits_planes

    def _relieve(self, running: Iterable[Sequence], config: SchedulerConfig) -> None:
        """The reserve is twice what an admission leaves: what comes back now should not have to go soon."""
        reserve = 2 * (config.watermark + config.reserved)
        for sequence in running:
            if self._left:
                self._restore(sequence, PlaneCause.RELIEF, reserve)
        self._left -= self._precision.restore_idle(self._left, reserve=reserve)

    def _restore(self, sequence: Sequence, cause: PlaneCause, reserve: float) -> int:
        restored = self._precision.restore(sequence.request_id, self._left, reserve=reserve, cause=cause)
        self._left -= restored
        return restored
