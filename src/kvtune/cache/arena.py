"""One range of block ids: free list, eviction order and spending."""

from __future__ import annotations

from kvtune.cache.eviction import EvictionPolicy
from kvtune.cache.plane_rows import PlaneRows
from kvtune.spec import PoolBudget
from kvtune.types import BlockId

__all__ = ["Arena"]


class Arena:
    """Written by its `BlockPool` alone."""

    def __init__(
        self, ids: range, budget: PoolBudget, policy: EvictionPolicy, planes: PlaneRows | None = None
    ) -> None:
        self.ids = ids
        self.budget = budget
        self.free = [BlockId(i) for i in reversed(ids)]  # lowest id on top
        self.policy = policy
        self.planes = planes

    @property
    def spent(self) -> int:
        taken = len(self.ids) - len(self.free)
        if self.planes is None:
            return taken
        return taken * self.budget.block + self.planes.num_used * self.budget.plane

    @property
    def room(self) -> int:
        """What could be spent once all idle blocks had left; negative where the budget was lowered."""
        if self.planes is None:
            return self.budget.total - len(self.ids) + len(self.free) + len(self.policy)
        idle = len(self.policy) * self.budget.block + len(self.planes.idle) * self.budget.plane
        return self.budget.total - self.spent + idle

    @property
    def can_take(self) -> bool:
        """Whether the budget has a whole block left without an eviction."""
        if self.planes is None:
            return bool(self.free) and len(self.ids) - len(self.free) < self.budget.total
        return bool(self.free) and self.spent + self.budget.whole <= self.budget.total
