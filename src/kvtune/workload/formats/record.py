"""What a format is: how to recognise its first record and how to turn one record into requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

__all__ = ["Format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """`matches` sees the first record (JSON object, or CSV column name -> text); `parse` one record at
    a time; `finish` all requests in file order, for what one record cannot know (session chains).

    `block_size`: tokens per hash id where the publisher fixed it, None where the rows have to tell.
    """

    name: str
    title: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Row], Iterable[WorkloadRequest]]
    finish: Callable[[list[WorkloadRequest]], list[WorkloadRequest]] | None = None
    is_csv: bool = False
    block_size: int | None = None
