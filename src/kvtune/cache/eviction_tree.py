"""Which candidates of a prefix tree may leave: those without resident children.

In a group that sees the whole context a block is used together with all blocks before it, so a child is
never in use while its parent is not. Where a block is given up or missing while a child of it is in use, the
group is a sliding window that has passed the block: its children do not need it, and it may leave before
them. Hence, whenever there are candidates, at least one of them may leave.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from kvtune.types import BlockId

__all__ = ["TreeBlock", "TreePolicy"]


class TreeBlock:
    """A block's place in the tree. Policies derive their facts about a block from it."""

    __slots__ = ("is_passed", "is_pinned", "num_children", "num_pinned_children", "parent")

    def __init__(self) -> None:
        self.parent: TreeBlock | None = None
        self.num_children = 0  # resident
        self.num_pinned_children = 0
        self.is_pinned = False
        self.is_passed = False

    @property
    def may_leave(self) -> bool:
        """Asked of candidates."""
        return self.num_children == 0 or self.is_passed

    def enter(self, parent: TreeBlock | None) -> bool:
        """The block became resident, pinned. True if that lets its parent leave."""
        self.parent = parent
        if parent is not None:
            parent.num_children += 1
        return self.pin()

    def pin(self) -> bool:
        """True if that lets the parent leave, a candidate then."""
        self.is_pinned, self.is_passed = True, False
        parent = self.parent
        if parent is None:
            return False
        parent.num_pinned_children += 1
        if parent.is_pinned or parent.is_passed:
            return False
        parent.is_passed = True
        return True

    def unpin(self) -> None:
        self.is_pinned = False
        self.is_passed = self.num_pinned_children > 0
        if self.parent is not None:
            self.parent.num_pinned_children -= 1

    def leave(self) -> bool:
        """The block is not resident any more. True if that lets its parent leave."""
        parent = self.parent
        if parent is None:
            return False
        parent.num_children -= 1
        return parent.num_children == 0 and not parent.is_pinned


_Block = TypeVar("_Block", bound=TreeBlock)


class TreePolicy(Generic[_Block]):
    """Who is resident, and which of them are candidates."""

    def __init__(self) -> None:
        self._resident: dict[BlockId, _Block] = {}
        self._num_candidates = 0

    def __len__(self) -> int:
        return self._num_candidates

    def _candidate(self, block_id: BlockId) -> _Block:
        block = self._resident[block_id]
        if block.is_pinned:
            raise KeyError(block_id)
        return block

    def _pinned(self, block_id: BlockId) -> _Block:
        block = self._resident[block_id]
        if not block.is_pinned:
            raise KeyError(block_id)
        return block
