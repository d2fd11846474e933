"""What one request holds in every group, and whether the pools have room for more of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtune.cache.block_hashes import BlockHashes
from kvtune.cache.group import GroupCache
from kvtune.cache.table import NULL_BLOCK, Need, Table
from kvtune.errors import InvariantError
from kvtune.types import BlockHash, BlockId, BlockTable, RequestId

__all__ = [
    "Holding",
    "Holdings",
    "is_enough",
    "needed_blocks",
    "peak_needs",
    "shared_block",
    "shortfalls",
]


class Holding:
    """Block tables of one request and how far they are computed, published and released."""

    __slots__ = (
        "commit_at",
        "hashes",
        "is_private",
        "may_share_last",
        "num_computed",
        "num_led",
        "num_published",
        "num_released",
        "parent",
        "promised",
        "root",
        "snapshot",
        "tables",
    )

    def __init__(
        self,
        tables: list[Table[int]],
        root: BlockHash,
        hashes: BlockHashes | list[BlockHash],
        num_computed: int,
    ) -> None:
        self.tables = tables
        self.root = root
        self.hashes = hashes  # the chain so far; may run ahead of what is computed
        self.num_computed = num_computed
        self.commit_at = 0  # computed tokens at which a commit has more to do than to count them
        self.snapshot: tuple[BlockTable, ...] | None = None  # of the tables, while they stay as they are
        self.num_led = 0  # hashes known at its admission: those it may lead
        self.num_published = 0  # blocks, the same in every group
        self.num_released = [0] * len(tables)  # leading blocks that left the window
        self.promised = [0] * len(tables)  # body blocks that passed the room test but are not taken yet
        self.is_private = False  # publishes nothing any more
        self.parent: BlockHash | None = (
            None  # of the next block, where nothing but its content is to be seen to
        )
        self.may_share_last = False  # forked once: its partially computed block may be in another table


class Holdings(dict[RequestId, Holding]):
    """By request, in order of admission. InvariantError for one that holds nothing."""

    def __missing__(self, request_id: RequestId) -> Holding:
        raise InvariantError(f"request {request_id!r} holds no blocks")


def shared_block(group: GroupCache, holding: Holding, table: Table[int]) -> BlockId | None:
    """The partially computed last block, if another table holds it too."""
    index, offset = divmod(holding.num_computed, group.block_size)
    if not offset or group.pool.ref_count(BlockId(table[index])) <= 1:
        return None
    return BlockId(table[index])


def needed_blocks(groups: Sequence[GroupCache], holding: Holding, num_tokens: int) -> list[Need]:
    """New blocks per group for slots below `num_tokens`, copies of a shared last block included."""
    needs: list[Need] = []
    for group, table in zip(groups, holding.tables, strict=True):
        body, first = max(0, -(-num_tokens // group.block_size) - len(table)), 0
        if body and not len(table) and group.pool.has_first:
            body, first = body - 1, 1
        shared = shared_block(group, holding, table)
        if shared is not None:
            is_first = group.pool.is_first(shared)
            body, first = body + (not is_first), first + is_first
        needs.append((body, first))
    return needs


def peak_needs(
    groups: Sequence[GroupCache], holding: Holding, needs: Sequence[Need], *, num_tokens: int, chunk: int
) -> list[Need]:
    """`needs` raised to the peak of a whole sequence computed `chunk` tokens a step."""
    peaks: list[Need] = []
    for group, table, (body, first) in zip(groups, holding.tables, needs, strict=True):
        held = len(table) if group.window is None else len(table) - table.count(NULL_BLOCK)
        peaks.append((max(body, group.peak_blocks(num_tokens, chunk) - held - first), first))
    return peaks


def shortfalls(
    groups: Sequence[GroupCache],
    needs: Sequence[Need],
    reserve: float,
    *,
    revived: Sequence[Need] | None = None,
    leaving: Sequence[Holding] = (),
    keep_promises: bool = False,
    restored: Sequence[int] | None = None,
) -> list[Need]:
    """What each pool lacks (body, first), in its budget's unit, to give what is needed and keep a share of
    `reserve` available; all zero where there is room.

    `revived`: what the idle ones of the matched blocks cost, per group: they stop being available.
    `leaving` would give their blocks back first. `keep_promises` counts blocks promised to others.
    `restored[g]` resting planes get a row again.
    """
    lacking: list[Need] = []
    for g, (group, need) in enumerate(zip(groups, needs, strict=True)):
        pool = group.pool
        idle = revived[g] if revived else (0, 0)
        left = pool.released_worth([h.tables[g] for h in leaving]) if leaving else (0, 0)
        short = [0, 0]
        for is_first in (False, True):
            taken = need[is_first] * pool.price(first=is_first) + idle[is_first]
            if restored is not None and not is_first:
                taken += restored[g] * pool.budget.plane
            if not taken:
                continue
            if keep_promises and not is_first:
                taken += group.promised * pool.price()
            room = pool.room(first=is_first) + left[is_first]
            kept = int(reserve * pool.size(first=is_first)) * pool.price(first=is_first)
            short[is_first] = max(0, taken + kept - room)
        lacking.append((short[0], short[1]))
    return lacking


def is_enough(lacking: Iterable[Need]) -> bool:
    return not any(body or first for body, first in lacking)
