"""A fake KV memory: each slot holds the whole prefix it stands for, so a wrong byte is visible.

The KV of a token depends on every token before it (and on the tenant's salt). `PrefixMemory` stores
exactly that: reading a sequence's slots through its block tables and finding any other prefix means
that a hit was wrong or that a live block was overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtune.types import BlockCopy, BlockTable

__all__ = ["PrefixMemory"]

_Slot = tuple[str, tuple[int, ...]]


class PrefixMemory:
    """Slots of all groups; `windows[g]` is None or the group's window in tokens."""

    def __init__(self, windows: Sequence[int | None], block_size: int) -> None:
        self._windows = list(windows)
        self._block_size = block_size
        self._slots: dict[tuple[int, int, int], _Slot] = {}

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Run copy-on-write copies in order."""
        for item in copies:
            for offset in range(self._block_size):
                slot = self._slots.get((item.group, item.src, offset))
                if slot is not None:
                    self._slots[item.group, item.dst, offset] = slot

    def write(
        self, tables: Sequence[BlockTable], tokens: Sequence[int], start: int, end: int, *, salt: str = ""
    ) -> None:
        """Compute positions [start, end) of `tokens`, after checking what their queries read."""
        for position in range(start, end):
            for g, table in enumerate(tables):
                block, offset = int(table[position // self._block_size]), position % self._block_size
                assert block >= 0, f"group {g}: position {position} has no slot"
                self._slots[g, block, offset] = (salt, tuple(tokens[: position + 1]))
            self.verify(tables, tokens, position + 1, salt=salt, reader=position)

    def verify(
        self,
        tables: Sequence[BlockTable],
        tokens: Sequence[int],
        num_computed: int,
        *,
        salt: str = "",
        reader: int | None = None,
    ) -> None:
        """Assert that all positions a query at `reader` sees (default: the next one) hold their prefix."""
        reader = num_computed if reader is None else reader
        for g, table in enumerate(tables):
            window = self._windows[g]
            low = 0 if window is None else max(0, reader - window + 1)
            for position in range(low, num_computed):
                block, offset = int(table[position // self._block_size]), position % self._block_size
                found = self._slots.get((g, block, offset))
                wanted = (salt, tuple(tokens[: position + 1]))
                assert found == wanted, f"group {g} block {block}+{offset}: {found}, not {wanted}"

    def block(self, group: int, block_id: int) -> tuple[_Slot | None, ...]:
        """Contents of one block's slots."""
        return tuple(self._slots.get((group, block_id, offset)) for offset in range(self._block_size))
