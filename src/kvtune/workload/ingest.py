"""Collecting a file's requests within bounded memory, and what was odd about them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kvtune.errors import InputFileError, UsageError
from kvtune.workload.formats import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

__all__ = ["MAX_HELD_BYTES", "BlockSizes", "Ingest"]

MAX_HELD_BYTES: Final = 4 * 2**30
"""Memory the requests of one file may take, by estimate."""

_REQUEST_BYTES: Final = 800
_MAX_SHOWN: Final = 5


@dataclass(slots=True)
class BlockSizes:
    """The block sizes B in [low, high] with ceil(input_length / B) == len(hash_ids) in every row so far,
    and which lines set the two bounds."""

    low: int = 1
    high: int | None = None
    low_line: int = 0
    high_line: int = 0
    num_short: int = 0
    """Rows whose ids cover fewer tokens than the prompt has, at the size the user gave."""

    def narrow(self, input_length: int, num_ids: int, line: int) -> None:
        if num_ids == 0 or input_length <= 0:
            if input_length > 0:
                self.high, self.high_line = 0, line
            return
        low = -(-input_length // num_ids)
        if low > self.low:
            self.low, self.low_line = low, line
        if num_ids > 1:
            # ceil(L / B) > n - 1  <=>  B < L / (n - 1)
            high = -(-input_length // (num_ids - 1)) - 1
            if self.high is None or high < self.high:
                self.high, self.high_line = high, line

    def describe(self) -> str:
        """What the rows say, where that is not one size."""
        if self.high is None or self.low < self.high:
            return f"every size from {self.low} to {self.high or 'any'} fits"
        if self.high == 0:
            return f"line {self.high_line} has tokens and no hash ids"
        return (
            f"no size gives every row as many blocks as it has hash ids (line {self.low_line} needs at least "
            f"{self.low}, line {self.high_line} at most {self.high})"
        )


@dataclass(slots=True)
class Ingest:
    """Requests in file order, with unique ids. `limit`: keep the first so many.

    Raises UsageError when they take more than `max_held_bytes`.
    """

    format: Format
    trace_block_size: int | None
    limit: int | None
    max_held_bytes: int = MAX_HELD_BYTES
    requests: list[WorkloadRequest] = field(default_factory=list[WorkloadRequest])
    sizes: BlockSizes = field(default_factory=BlockSizes)
    _seen: set[str] = field(default_factory=set[str])
    _repeats: dict[str, int] = field(default_factory=dict[str, int])
    _held_bytes: int = 0
    _latest_s: float = 0.0
    _num_early: int = 0
    _first_early: int = 0
    _num_repeated: int = 0
    _first_repeated: int = 0
    _unknown: dict[str, int] = field(default_factory=dict[str, int])

    def read(self, rows: Iterable[Row]) -> None:
        """Take all rows (those after the limit still tell the block size, where that is needed)."""
        for row in rows:
            self._check_columns(row)
            for request in self.format.parse(row):
                if request.hash_ids is not None:
                    self._check_hashes(row, request)
                if self.limit is None or len(self.requests) < self.limit:
                    self._keep(row, request)
                elif request.hash_ids is None or self.trace_block_size is not None:
                    return

    def warnings(self) -> list[str]:
        """One line for each thing that was wrong and is dealt with."""
        found: list[str] = []
        if self._unknown:
            names = ", ".join(ascii(name)[:40] for name in itertools.islice(self._unknown, _MAX_SHOWN))
            more = ", ..." if len(self._unknown) > _MAX_SHOWN else ""
            line = min(self._unknown.values())
            found.append(
                f"columns unknown in {self.format.name} are ignored: {names}{more} (first at line {line})"
            )
        if self._num_repeated:
            found.append(
                f"{self._num_repeated} request ids are there already (first at line {self._first_repeated}); "
                "they got their line's number added"
            )
        if self._num_early:
            found.append(
                f"{self._num_early} requests arrive before the one in the row above (first at line "
                f"{self._first_early}); sorted by arrival"
            )
        if self.sizes.num_short and self.format.block_size is None:
            found.append(
                f"{self.sizes.num_short} requests have too few hash ids for their input_length at "
                f"{self.trace_block_size} tokens per id; tokens beyond them are never cached"
            )
        return found

    def _check_columns(self, row: Row) -> None:
        known = self.format.columns
        if known is None or row.fields.keys() <= known or len(self._unknown) > _MAX_SHOWN:
            return
        for name in row.fields.keys() - known:
            if len(self._unknown) <= _MAX_SHOWN:
                self._unknown.setdefault(name, row.line)

    def _check_hashes(self, row: Row, request: WorkloadRequest) -> None:
        ids, length = request.hash_ids or (), request.input_length
        if length is None:
            row.fail("'input_length' is missing; a request with 'hash_ids' needs it")
        self.sizes.narrow(length, len(ids), row.line)
        size = self.trace_block_size
        if size is None or length <= 0:
            return
        if len(ids) > -(-length // size):
            row.fail(
                f"{len(ids)} hash ids for {length} tokens, more than blocks of {size} tokens; "
                "give another --trace-block-size"
            )
        self.sizes.num_short += len(ids) < -(-length // size)

    def _keep(self, row: Row, request: WorkloadRequest) -> None:
        self._held_bytes += _size_of(request)
        if self._held_bytes > self.max_held_bytes:
            raise InputFileError(
                f"{row.path}, line {row.line}: the requests up to here take more than "
                f"{self.max_held_bytes / 2**30:g} GiB of memory; use a part of the file"
            )
        if self.format.has_clock:
            if request.arrival_s < self._latest_s:
                self._num_early += 1
                self._first_early = self._first_early or row.line
            self._latest_s = request.arrival_s
        self.requests.append(self._with_unique_id(request, row.line))

    def _with_unique_id(self, request: WorkloadRequest, line: int) -> WorkloadRequest:
        """Engines need unique ids; files repeat them (ShareGPT splits long conversations, logs retry)."""
        name = unique = request.request_id
        if name in self._seen:
            if name != f"line-{line}":  # a reader's own name, repeated where records share a line
                self._num_repeated += 1
                self._first_repeated = self._first_repeated or line
            # Numbered on from the last one: a file of equal ids must not be searched again for each.
            numbers = itertools.count(self._repeats.get(name, 0))
            unique, self._repeats[name] = next(
                (other, n + 1)
                for n in numbers
                if (other := f"{name}@{line}" + f".{n}" * (n > 0)) not in self._seen
            )
        self._seen.add(unique)
        return request if unique == name else dataclasses.replace(request, request_id=unique)


def _size_of(request: WorkloadRequest) -> int:
    """Bytes a request takes, roughly: lists of numbers 40 a number (8 where a session shares them)."""
    ids = len(request.hash_ids or ()) * (8 if request.session_id else 40)
    ids += 40 * len(request.token_ids or ())
    text = len(request.prompt or "") + sum(len(message.content) + 150 for message in request.messages)
    text += sum(map(len, request.tools)) + len(request.answer or "") + len(request.request_id)
    return _REQUEST_BYTES + ids + 2 * text


def check_positive(**values: int | None) -> None:
    """Raises UsageError unless every number that is given is at least 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, found {value}")
