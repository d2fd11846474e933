"""What a pool of blocks may spend: one purse for whole blocks and for their low planes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PoolBudget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBudget:
    """`total` buys blocks at `block` each and, while they have it, their low planes at `plane` each.

    The unit belongs to whoever sets the prices; a pool only adds and compares. A block is always taken with
    its plane, so a dropped plane pays for a part of the next block. Without planes a block costs 1.
    """

    total: int
    block: int = 1
    plane: int = 0

    @property
    def whole(self) -> int:
        """Price of a block with its low plane."""
        return self.block + self.plane

    @property
    def num_whole(self) -> int:
        """Blocks at full precision."""
        return self.total // self.whole

    @property
    def num_ids(self) -> int:
        """Most blocks there can ever be: all of them without their planes."""
        return self.total // self.block
