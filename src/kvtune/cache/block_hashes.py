"""Hashes of a prefix's blocks in one stretch of memory, 32 bytes each, where native code reads them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, overload

from kvtune.types import BlockHash

__all__ = ["HASH_BYTES", "BlockHashes", "joined", "own_copy", "packed"]

HASH_BYTES: Final = 32


class BlockHashes(Sequence[BlockHash]):
    """A sequence of block hashes; slices share its memory. Only what was never sliced may grow."""

    __slots__ = ("_data", "_num", "start")

    def __init__(self, data: array[int], start: int = 0, num: int | None = None) -> None:
        """`data`: type code "B"; hash `start` is the first of `num`."""
        self._data = data
        self.start = start
        self._num = len(data) // HASH_BYTES - start if num is None else num

    @property
    def address(self) -> int:
        """Of the memory that `start` counts from."""
        return self._data.buffer_info()[0]

    def copy(self) -> BlockHashes:
        end = self.start + self._num
        return BlockHashes(self._data[self.start * HASH_BYTES : end * HASH_BYTES])

    def append(self, block_hash: BlockHash) -> None:
        """A hash of 32 bytes."""
        self._data.frombytes(block_hash)
        self._num += 1

    def extend(self, hashes: Iterable[BlockHash]) -> None:
        more = packed(hashes)
        end = more.start + len(more)
        self._data.extend(more._data[more.start * HASH_BYTES : end * HASH_BYTES])
        self._num += len(more)

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> BlockHashes: ...
    def __getitem__(self, index: int | slice) -> BlockHash | BlockHashes:
        if isinstance(index, slice):
            start, end, step = index.indices(self._num)
            if step != 1:
                raise ValueError("block hashes are sliced in order")
            return BlockHashes(self._data, self.start + start, max(0, end - start))
        if not -self._num <= index < self._num:
            raise IndexError(index)
        at = (self.start + index % self._num) * HASH_BYTES
        return BlockHash(self._data[at : at + HASH_BYTES].tobytes())

    def __iter__(self) -> Iterator[BlockHash]:
        begin, end = self.start * HASH_BYTES, (self.start + self._num) * HASH_BYTES
        data = self._data[begin:end].tobytes()
        return (BlockHash(data[at : at + HASH_BYTES]) for at in range(0, len(data), HASH_BYTES))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # it may grow


def packed(hashes: Iterable[BlockHash]) -> BlockHashes:
    """The hashes in one stretch; names shorter than 32 bytes get zeros behind them."""
    if isinstance(hashes, BlockHashes):
        return hashes
    names = list(hashes)
    data = b"".join(names)
    if len(data) != HASH_BYTES * len(names) or any(len(h) != HASH_BYTES for h in names):
        data = b"".join([h.ljust(HASH_BYTES, b"\0") for h in names])
    return BlockHashes(array("B", data))


def joined(head: Sequence[BlockHash], tail: Sequence[BlockHash]) -> Sequence[BlockHash]:
    """Both in a row; names keep their lengths."""
    if isinstance(head, BlockHashes) and isinstance(tail, BlockHashes):
        both = head.copy()
        both.extend(tail)
        return both
    return (*head, *tail)


def own_copy(hashes: Sequence[BlockHash]) -> BlockHashes | list[BlockHash]:
    """To be extended without touching the original."""
    return hashes.copy() if isinstance(hashes, BlockHashes) else list(hashes)
