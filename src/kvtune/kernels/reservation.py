"""Memory that is taken when it is written and given back row by row, without moving what stays.

Address space costs nothing: an arena is reserved as large as it may ever become, and the machine backs the
pages that were written (vAttention uses the same trick with CUDA's virtual memory).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import torch

__all__ = ["Reservation", "zeroed"]

_LARGE_FROM = 16 << 20
"""Bytes from which large pages pay: the translations of less fit a CPU's tables in small pages."""


class Reservation:
    """Zero-filled `tensor` uint8 [num_rows, row_bytes] in pages of its own."""

    def __init__(self, num_rows: int, row_bytes: int, *, large_pages: bool = False) -> None:
        """`large_pages`: ask for 2 MiB where the system has them; memory is then taken so much at a time.

        OSError or MemoryError where the machine has no such address space.
        """
        self._row_bytes = row_bytes
        self._size = num_rows * row_bytes
        self._map: mmap.mmap | None = None
        if not self._size:
            self.tensor = torch.zeros(num_rows, row_bytes, dtype=torch.uint8)
            return
        # private pages: shared ones would stay in the page cache when they are given back
        self._map = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8).view(num_rows, row_bytes)

    def give_back(self, rows: Iterable[int]) -> int:
        """Return the whole pages that lie in these rows to the machine; they read as zeros afterwards.

        Returns the bytes of those pages; 0 where the system knows no such call.
        """
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return 0
        returned, page = 0, mmap.PAGESIZE
        for first, last in _runs(sorted(set(rows))):
            start = -(-first * self._row_bytes // page) * page
            end = (last + 1) * self._row_bytes
            end = self._size if last + 1 == len(self.tensor) else end // page * page
            if end > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
                returned += end - start
        return returned


def zeroed(num_rows: int, row_bytes: int) -> torch.Tensor:
    """Zero-filled uint8 [num_rows, row_bytes] that is read in a scattered order and given back as a whole.

    Every block of a sequence lies elsewhere: in pages of 4 KiB each costs the address translations of all its
    heads, a tenth of the time of decode attention over a cache larger than an L3.
    """
    if num_rows * row_bytes < _LARGE_FROM:
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8)
    return Reservation(num_rows, row_bytes, large_pages=True).tensor


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive rows."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] + 1 == row:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    return runs
