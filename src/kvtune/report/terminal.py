"""The same pictures in a terminal: sparklines and a curve in braille dots. Plain text, no control codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvtune.report.record import as_mapping, as_sequence, find, number, show_number

__all__ = ["curve_lines", "sparkline", "timeline_lines"]

_BARS: Final = "▁▂▃▄▅▆▇█"
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column of its 4 x 2 dots."""


def sparkline(values: Sequence[float | None], *, width: int = 60, top: float | None = None) -> str:
    """One character per value, from 0 to the largest (or `top`); blanks where nothing was seen.

    More values than `width` are merged, each group by its largest.
    """
    step = max(1, -(-len(values) // width))
    groups = [values[at : at + step] for at in range(0, len(values), step)]
    merged = [max((v for v in group if v is not None), default=None) for group in groups]
    most = max((v for v in merged if v is not None), default=0.0) if top is None else top
    return "".join(" " if v is None else _bar(v, most) for v in merged)


def _bar(value: float, most: float) -> str:
    share = value / most if most > 0 else 0.0
    return _BARS[min(len(_BARS) - 1, max(0, math.ceil(share * len(_BARS)) - 1))]


def curve_lines(record: Mapping[str, Any], *, width: int = 60, height: int = 8) -> list[str]:
    """The LRU curve of a record of `simulate --mode cache` with its knee; no line without a curve.

    `width`, `height` in characters; the axis of cache sizes is logarithmic.
    """
    found = [
        (number(as_mapping(point).get("capacity_blocks")), number(as_mapping(point).get("block_hit_rate")))
        for point in as_sequence(find(record, "curve.points"))
    ]
    points = [(math.log(x), y) for x, y in found if x is not None and y is not None and x > 0]
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return []
    top = max(y for _, y in points) or 1.0
    low, high = points[0][0], points[-1][0]
    dots = _Dots(width, height)
    for column in range(2 * width):
        x = low + (high - low) * column / (2 * width - 1)
        dots.set(column, _at(points, x) / top)
    labels = [
        f"{100 * top * (height - row) / height:5.1f} %" if row % 3 == 0 else "" for row in range(height)
    ]
    lines = [f"{label:>7} │{text}" for label, text in zip(labels, dots.rows(), strict=True)]
    return [*lines, *_below(record, low, high, width)]


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    """The curve at x: the value of the last point at or before it."""
    best = points[0][1]
    for place, value in points:
        if place > x + 1e-9:
            break
        best = value
    return best


def _below(record: Mapping[str, Any], low: float, high: float, width: int) -> list[str]:
    axis = ["─"] * width
    knee = as_mapping(find(record, "curve.knee"))
    at, rate = number(knee.get("capacity_blocks")), number(knee.get("block_hit_rate"))
    note = ""
    if at is not None and rate is not None and at > 0:
        axis[min(width - 1, max(0, int((math.log(at) - low) / (high - low) * (width - 1))))] = "┴"
        note = f"knee: {at:,.0f} blocks, {100 * rate:.1f} %"
    ends = f"{math.exp(low):,.0f}", f"{math.exp(high):,.0f} blocks"
    gap = width - len(ends[0]) - len(ends[1])
    middle = note.center(max(len(note) + 2, gap)) if note else " " * max(1, gap)
    return [f"{'':7} └{''.join(axis)}", f"{'':9}{ends[0]}{middle}{ends[1]}"]


class _Dots:
    """A field of braille dots, two to a character across and four down."""

    def __init__(self, width: int, height: int) -> None:
        self._cells = [[0] * width for _ in range(height)]

    def set(self, column: int, share: float) -> None:
        """A dot at `share` of the height, in a column of dots."""
        height = 4 * len(self._cells)
        row = height - 1 - min(height - 1, max(0, round(share * (height - 1))))
        self._cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    def rows(self) -> list[str]:
        return ["".join(chr(0x2800 + bits) for bits in row) for row in self._cells]


def timeline_lines(record: Mapping[str, Any], *, width: int = 60) -> list[str]:
    """The course of a simulated run as sparklines, each with its largest value; no line without one."""
    timeline = as_mapping(record.get("timeline"))
    rows: list[tuple[str, str, str]] = []
    for key, name, unit, scale in (
        ("running", "running", "", 1.0),
        ("waiting", "waiting", "", 1.0),
        ("kv_referenced", "KV in use", "%", 100.0),
        ("token_hit_rate", "prompt tokens hit", "%", 100.0),
        ("p95_ttft_ms", "TTFT p95", "s", 1e-3),
        ("preemptions", "preemptions", "", 1.0),
    ):
        values = [number(value) for value in as_sequence(timeline.get(key))]
        scaled = [None if v is None else v * scale for v in values]
        most = max((v for v in scaled if v is not None), default=0.0)
        if most > 0:
            rows.append((name, sparkline(scaled, width=width), f"max {show_number(most, unit)}"))
    label = max((len(name) for name, _, _ in rows), default=0)
    return [f"  {name:<{label}}  {line}  {most}" for name, line, most in rows]
