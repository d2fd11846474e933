"""Cutting a file into records: JSON lines, JSON objects spread over lines, the elements of one JSON list,
or CSV records (whose quoted cells may hold line ends)."""

from __future__ import annotations

import bisect
import csv
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, Final, cast

from kvtune.errors import InputFileError
from kvtune.workload.row import Row, decode_json
from kvtune.workload.source import Source

__all__ = ["json_rows", "read_rows"]

_READ_AHEAD: Final = 1 << 16
_BLANK: Final = re.compile(r"[ \t\r\n]*")
_CSV_FIELD_LIMIT: Final = 131_072


def read_rows(source: Source) -> tuple[bool, Iterator[Row]]:
    """(is it CSV, the records). JSON starts with `{` or `[`; anything else must be CSV with a header."""
    first = source.first_character()
    if not first:
        raise InputFileError(f"{source.path}: holds only blank lines; a workload needs at least one request")
    if first in "{[":
        return False, json_rows(source) if first == "{" else _list_rows(source)
    return True, _csv_rows(source)


def json_rows(source: Source) -> Iterator[Row]:
    """One object per line, or objects spread over lines (where the first line is not a whole one)."""
    lines = source.lines()
    first = next(lines)
    if _is_cut_off(first[1]):
        yield from _object_rows(source)
        return
    for number, text in itertools.chain([first], lines):
        yield _as_row(source, number, decode_json(source.path, number, text))


def _is_cut_off(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _object_rows(source: Source) -> Iterator[Row]:
    text = _Window(source)
    text.skip_blank()
    while text.peek():
        line = text.line
        yield _as_row(source, line, text.take_value())
        text.skip_blank()


def _as_row(source: Source, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputFileError(
            f"{source.path}, line {line}: expected a JSON object, found {ascii(value)[:60]}; "
            "write one request object per line"
        )
    return Row(source.path, line, cast("dict[str, Any]", value))


def _list_rows(source: Source) -> Iterator[Row]:
    """The objects of one JSON list, decoded one at a time so that memory holds one element."""
    text = _Window(source)
    text.skip_blank()
    text.take("[")
    text.skip_blank()
    if text.peek() == "]":
        raise InputFileError(f"{source.path}: the list is empty; a workload needs at least one request")
    while True:
        line = text.line
        yield _as_row(source, line, text.take_value())
        text.skip_blank()
        if text.peek() != ",":
            break
        text.take(",")
        text.skip_blank()
    text.take("]")
    text.skip_blank()
    if text.peek():
        text.fail(f"expected the end of the file after the list, found {text.peek()!a}")


class _Window:
    """A moving window over the text of a file that knows which line it is at."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces = source.pieces()
        self._buffer = ""
        self._at = 0
        self._starts: list[int] = []  # offset in the buffer at which each piece starts, ascending
        self._numbers: list[int] = []  # and the number of its line
        self._is_drained = False

    @property
    def line(self) -> int:
        return self._line_at(self._at)

    def fail(self, message: str, *, at: int | None = None) -> None:
        line = self._line_at(self._at if at is None else at)
        raise InputFileError(f"{self._source.path}, line {line}: malformed JSON: {message}")

    def peek(self) -> str:
        """The next character, "" at the end."""
        if self._at >= len(self._buffer):
            self._grow(_READ_AHEAD)
        return self._buffer[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            self.fail(f"expected '{expected}', found {ascii(self.peek()) if self.peek() else 'the end'}")
        self._at += 1

    def skip_blank(self) -> None:
        while self.peek():
            found = _BLANK.match(self._buffer, self._at)
            if found is None or found.end() == self._at:
                return
            self._at = found.end()
            self._drop_taken()

    def take_value(self) -> Any:
        """The next JSON value; one cut off by the window's end is decoded again with twice the text."""
        decoder = json.JSONDecoder(parse_constant=_refuse_constant)
        self._drop_taken()
        size = _READ_AHEAD
        while True:
            self._grow(size)
            try:
                value, self._at = decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._is_drained:
                    self.fail(error.msg, at=error.pos)
                if len(self._buffer) - self._at > self._source.max_line_bytes:
                    self.fail(
                        f"{error.msg}, or an element over {self._source.max_line_bytes} characters",
                        at=error.pos,
                    )
            except (ValueError, RecursionError) as error:
                self.fail(str(error).split(";")[0])
            else:
                # A number at the window's end could go on, but only objects are requests.
                return value
            size = 2 * (len(self._buffer) - self._at)

    def _line_at(self, offset: int) -> int:
        place = bisect.bisect_right(self._starts, offset)
        return self._numbers[place - 1] if place else 1

    def _drop_taken(self) -> None:
        """Forget the text before the cursor, now and then: each time would cost a copy per element."""
        if self._at < _READ_AHEAD:
            return
        first = max(0, bisect.bisect_right(self._starts, self._at) - 1)
        self._buffer = self._buffer[self._at :]
        # The line the cursor is in began before the window: its start becomes negative or 0.
        self._starts = [start - self._at for start in self._starts[first:]]
        self._numbers = self._numbers[first:]
        self._at = 0

    def _grow(self, size: int) -> None:
        """Hold at least `size` characters past the cursor (twice that when reading), or all to the end."""
        length = len(self._buffer)
        if length - self._at >= size or self._is_drained:
            return
        pieces = [self._buffer]
        while length - self._at < 2 * size and not self._is_drained:
            number, text = next(self._pieces, (0, ""))
            if not number:
                self._is_drained = True
                break
            self._starts.append(length)
            self._numbers.append(number)
            pieces.append(text)
            length += len(text)
        self._buffer = "".join(pieces)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _csv_rows(source: Source) -> Iterator[Row]:
    header: list[str] | None = None
    for number, text in _csv_records(source):
        try:
            cells = _cells(text)
        except (csv.Error, StopIteration) as error:
            raise InputFileError(f"{source.path}, line {number}: malformed CSV: {error}") from None
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) != len(header):
                raise InputFileError(f"{source.path}, line {number}: a column's name is there twice")
            continue
        if len(cells) != len(header):
            raise InputFileError(
                f"{source.path}, line {number}: has {len(cells)} columns, the header has {len(header)}"
            )
        yield Row(source.path, number, dict(zip(header, (c.strip() for c in cells), strict=True)))


def _csv_records(source: Source) -> Iterator[tuple[int, str]]:
    """(line it starts at, text) of each record; lines are joined while a quote is open."""
    held: list[str] = []
    start = quotes = size = 0
    for number, text in source.lines(keep_blank=True):
        if not held and (not text or text.isspace()):
            continue
        start = start if held else number
        held.append(text)
        quotes += text.count('"')
        size += len(text) + 1
        if quotes % 2 == 0:
            yield start, "\n".join(held)
            held, quotes, size = [], 0, 0
        elif size > source.max_line_bytes:
            break
    if held:
        raise InputFileError(
            f"{source.path}, line {start}: malformed CSV: a quoted cell that opens here has no end within "
            f"{source.max_line_bytes} characters"
        )


def _cells(text: str) -> list[str]:
    if len(text) < _CSV_FIELD_LIMIT:
        return next(csv.reader([text], strict=True))
    before = csv.field_size_limit(len(text))  # a setting of the whole process, so put back at once
    try:
        return next(csv.reader([text], strict=True))
    finally:
        csv.field_size_limit(before)
