"""Sequences that decode, as columns: a step gives one token to each of them and changes little else.

Most steps of a serving engine are alike: every sequence takes one more token, one in `block_size` of them
a new block, one fills its block, a few end. Here a step is a handful of array operations; single sequences
are touched only where something happens to them. A `Sequence` in the lane reads its counters from here and
takes its tokens over (`Sequence.catch_up`) when somebody looks at them, when a block is full, and when it
leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from kvtune.cache import KVCacheManager
from kvtune.sched.sequence import Sequence, service_order
from kvtune.types import BlockTable, DecodeColumns, RequestId, TokenArray

__all__ = ["DecodeLane"]

_SPAN: Final = 128
"""Tokens, about, after which a member takes them over."""
_FIRST_ROWS: Final = 16
_FIRST_WIDTH: Final = 16
Rows = npt.NDArray[np.int64]
_Value = TypeVar("_Value", bound=np.generic)


class DecodeLane:
    """Every member keeps a row of the columns while it is here; `members` are in service order.

    Between two steps a member has computed all of its tokens but the last one. The token at position p is at
    `_recent[row, p % _span]` until the whole span is full; a span is a few blocks.
    """

    def __init__(self, manager: KVCacheManager, *, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        self._manager = manager
        self._size = manager.block_size
        self._span = self._size * max(1, _SPAN // self._size)
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self.members: tuple[Sequence, ...] = ()
        self.request_ids: tuple[RequestId, ...] = ()
        self.order: Rows = np.zeros(0, dtype=np.int64)
        """The row of each member. All three are made anew when somebody comes or goes."""
        self._free: list[int] = []
        self._num_tokens: Rows = np.zeros(0, dtype=np.int64)
        self._num_blocks: Rows = np.zeros(0, dtype=np.int64)
        self._ends_at: Rows = np.zeros(0, dtype=np.int64)  # tokens at which its length ends it
        self._recent: TokenArray = np.zeros((0, self._span), dtype=np.int32)
        self._tables: list[BlockTable] = [
            np.full((0, _FIRST_WIDTH), -1, dtype=np.int32) for _ in range(manager.num_groups)
        ]
        self.num_uncomputed = 1  # tokens that each member has yet to compute
        self.last_step = 0  # in which all members were scheduled
        self._times_s: list[float] = []  # of the last tokens, the same for all members
        self._stop_ids: frozenset[int] = frozenset()  # of all members; those of former ones do no harm
        self._stops: Rows = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.members)

    # --- members

    def join(self, sequences: Iterable[Sequence]) -> None:
        """Sequences that decode, hold slots for all but their last token, and share no partial block."""
        joining = list(sequences)
        for sequence in joining:
            if not self._free:
                self._add_rows()
            self._enter(sequence, self._free.pop())
        self._become(sorted((*self.members, *joining), key=service_order))

    def _become(self, members: Iterable[Sequence]) -> None:
        self.members = tuple(members)
        self.request_ids = tuple([s.request_id for s in self.members])
        self.order = np.array([s.row for s in self.members], dtype=np.int64)

    def _enter(self, sequence: Sequence, row: int) -> None:
        num_tokens, sampling = sequence.num_tokens, sequence.sampling
        start = (num_tokens - 1) // self._span * self._span
        self._recent[row, : num_tokens - start] = sequence.token_ids[start:]
        self._num_tokens[row] = num_tokens
        self._ends_at[row] = min(sequence.num_prompt_tokens + sampling.max_tokens, self._max_model_len)
        tables = self._manager.block_tables(sequence.request_id)
        self._widen(len(tables[0]))
        self._num_blocks[row] = len(tables[0])
        for own, table in zip(self._tables, tables, strict=True):
            own[row] = -1
            own[row, : len(table)] = table
        stops = sequence.stop_ids(self._eos_token_ids)
        if not stops <= self._stop_ids:
            self._stop_ids |= stops
            self._stops = np.array(sorted(self._stop_ids), dtype=np.int64)
        sequence.enter(self, row)

    def leave(self, sequence: Sequence) -> None:
        """The sequence has its tokens and times itself again, and the manager knows what it computed.
        It stays among the members until `close_ranks`."""
        self._free.append(sequence.row)
        sequence.leave()
        manager, request_id, computed = self._manager, sequence.request_id, sequence.num_computed_tokens
        sequence.num_slots = manager.num_slots(request_id)
        if not manager.advance(request_id, computed):
            manager.commit(request_id, sequence.token_ids, computed)

    def close_ranks(self) -> None:
        """Those that left are not members any more."""
        self._become([s for s in self.members if s.is_in_lane])

    def clear(self) -> tuple[Sequence, ...]:
        """All members leave; returns them in service order."""
        members = self.members
        for sequence in members:
            self.leave(sequence)
        self._become(())
        self._times_s.clear()
        return members

    def _add_rows(self) -> None:
        old = len(self._num_tokens)
        new = max(_FIRST_ROWS, 2 * old)
        self._free.extend(range(new - 1, old - 1, -1))
        self._num_tokens = _longer(self._num_tokens, new)
        self._num_blocks = _longer(self._num_blocks, new)
        self._ends_at = _longer(self._ends_at, new)
        self._recent = _longer(self._recent, new)
        self._tables = [_longer(table, new) for table in self._tables]

    def _widen(self, num_blocks: int) -> None:
        """Room for that many blocks in a row of the tables."""
        width = self._tables[0].shape[1]
        if num_blocks > width:
            width = max(num_blocks, 2 * width)
            old, self._tables = self._tables, []
            for table in old:
                wider = np.full((len(table), width), -1, dtype=np.int32)
                wider[:, : table.shape[1]] = table
                self._tables.append(wider)

    # --- a step is decided

    def grow(self, reserve_of: Callable[[Sequence], float]) -> bool:
        """A block for each member whose blocks are full; False, and nothing done, without room for all.

        `reserve_of`: the share of blocks a member must leave; it never falls along the service order.
        """
        order = self.order
        tokens, blocks = self._num_tokens[order], self._num_blocks[order]
        short = np.flatnonzero(tokens > blocks * self._size)
        if not len(short):
            return True
        ids = [self.request_ids[i] for i in short.tolist()]
        new = self._manager.grow_each(ids, reserve=reserve_of(self.members[int(short[-1])]))
        if new is None:
            return False
        rows = order[short]
        at = blocks[short]
        self._widen(int(at.max()) + 1)
        for table, taken in zip(self._tables, new, strict=True):
            table[rows, at] = taken
        self._num_blocks[rows] += 1
        return True

    def columns(self) -> DecodeColumns:
        """What the members compute in this step, copied: it stays as it is."""
        order = self.order
        starts = self._num_tokens[order] - 1
        num_blocks = self._num_blocks[order]
        width = int(num_blocks.max())
        return DecodeColumns(
            request_ids=self.request_ids,
            token_ids=self._recent[order, _remainder(starts, self._span)],
            starts=starts,
            num_blocks=num_blocks,
            block_tables=tuple(table[:, :width].take(order, axis=0) for table in self._tables),
        )

    # --- a step is done

    def computed(self, step: int) -> None:
        """All members have computed their last token; `append` gives them the next one."""
        self.num_uncomputed = 0
        self.last_step = step

    def may_end(self, tokens: TokenArray) -> list[int]:
        """Members, ascending, that may end with the token sampled for them; all others go on."""
        ends = self._num_tokens[self.order] + 1 >= self._ends_at[self.order]
        if len(self._stops):
            ends |= np.isin(tokens, self._stops)
        return np.flatnonzero(ends).tolist()

    def to_commit(self) -> list[int]:
        """Members, ascending, that have filled a block or left one behind now that they computed their last
        token."""
        offset = _remainder(self._num_tokens[self.order], self._size)
        is_due = offset == self._manager.commit_offsets[0]
        for other in self._manager.commit_offsets[1:]:
            is_due |= offset == other
        return np.flatnonzero(is_due).tolist()

    def commit(self, due: Items[int]) -> None:
        """Publish what these members, by place and ascending, have completed."""
        if not due:
            return
        manager, rows = self._manager, self.order[due]
        num_tokens = self._num_tokens[rows]
        for i in np.flatnonzero(_remainder(num_tokens, self._span) == 0).tolist():
            self.members[due[i]].catch_up()  # its next token goes over the first one of the span
        changed: Items[int] | None = None
        if manager.commits_at_blocks:
            number = _remainder(num_tokens - 1, self._span) // self._size
            blocks = self._recent.reshape(len(self._recent), -1, self._size)[rows, number]
            changed = manager.commit_blocks([self.request_ids[i] for i in due], blocks)
        if changed is None:
            changed = range(len(due))
            for sequence in [self.members[i] for i in due]:
                manager.commit(sequence.request_id, sequence.token_ids, sequence.num_computed_tokens)
        for i in changed:
            tables = manager.block_tables(self.request_ids[due[i]])
            for own, table in zip(self._tables, tables, strict=True):
                own[rows[i], : len(table)] = table

    def append(self, tokens: TokenArray, now_s: float) -> None:
        """Every member took a token."""
        rows = self.order
        self.num_uncomputed = 1
        at = self._num_tokens[rows]
        self._recent[rows, _remainder(at, self._span)] = tokens
        self._num_tokens[rows] = at + 1
        self._times_s.append(now_s)
        if len(self._times_s) > 2 * self._span:
            del self._times_s[: -self._span]

    # --- looking

    def num_tokens(self, row: int) -> int:
        return int(self._num_tokens[row])

    def since(self, row: int, num_known: int) -> tuple[TokenArray, list[float]]:
        """Tokens, and their times, behind the first `num_known`, which reach into the last span."""
        count = int(self._num_tokens[row]) - num_known
        if not count:
            return self._recent[row, :0], []
        at = num_known % self._span
        return self._recent[row, at : at + count], self._times_s[-count:]


def _remainder(values: Rows, size: int) -> Rows:
    """values % size; a power of two takes a sixth of the time."""
    return values & (size - 1) if size & (size - 1) == 0 else values % size


def _longer(column: npt.NDArray[_Value], num_rows: int) -> npt.NDArray[_Value]:
    longer = np.zeros((num_rows, *column.shape[1:]), dtype=column.dtype)
    longer[: len(column)] = column
    return longer
