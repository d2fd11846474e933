"""Block tables, and what they are counted in."""

from __future__ import annotations

from array import array
from typing import cast

from kvtune.types import BlockId

__all__ = ["NULL_BLOCK", "Need", "Table", "ids_of", "null_blocks"]

NULL_BLOCK = BlockId(-1)

Table = array  # type code "i": int32 block ids, NULL_BLOCK where the window has passed

Need = tuple[int, int]
"""(body, first): new blocks of one group, or what blocks of it cost."""


def null_blocks(num_blocks: int) -> Table[int]:
    return Table("i", [NULL_BLOCK]) * num_blocks


def ids_of(table: Table[int]) -> list[BlockId]:
    """The entries one by one, for callers that walk them."""
    return cast("list[BlockId]", table.tolist())
