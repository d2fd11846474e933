"""What a format is: how to recognise its first record and how to turn one record into requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

__all__ = ["Finish", "Format"]

Finish = Callable[[list[WorkloadRequest], Path], tuple[list[WorkloadRequest], list[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """`matches` sees the first record (JSON object, or CSV column name -> text); `parse` one record at
    a time; `finish` all requests in file order and the file's path, for what one record cannot know
    (session chains, a table of lengths beside the file), and returns them with notes for the user.

    `columns`: every column the publisher writes; others are ignored with a warning (None: anything may
    stand beside what is read). `block_size`: tokens per hash id where the publisher fixed it, None where
    the rows have to tell. `has_clock`: whether arrivals of all records count from the same start.
    """

    name: str
    title: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Row], Iterable[WorkloadRequest]]
    finish: Finish | None = None
    columns: frozenset[str] | None = None
    is_csv: bool = False
    block_size: int | None = None
    has_clock: bool = True
