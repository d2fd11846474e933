"""Line figures and histograms as hand-written SVG, beside the scatter figures of `charts`.

Lines differ in dashes and dots as well as in colour, and each is named at its end. Geometry is in view-box
units; colours come from the page's style sheet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from kvtune.report.blocks import Bars, Lines, Mark, Series
from kvtune.report.charts import WIDTH, Axis, svg_figure, svg_line, svg_text
from kvtune.report.record import tick_text

_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 18, 16, 54
_TALL, _FLAT = 330, 190
_NUM_LOOKS = 6
_CHARACTER = 8.8
"""Width of a letter at the larger of the figures' text sizes, the phone's."""


def lines_svg(chart: Lines) -> str:
    """The whole figure with its legend; an empty text when no series has a point."""
    series = [s for s in chart.series if any(y is not None for _, y in s.points)]
    if not series:
        return ""
    height = _FLAT if chart.is_flat else _TALL
    x_axis = _x_axis(chart, series)
    tops = [y for s in series for _, y in s.points if y is not None] + [mark.y for mark in chart.marks]
    y_axis = _from_zero(max(tops), height - _BOTTOM, _TOP)
    parts = [_frame(chart, x_axis, y_axis, height)]
    parts += [_one_line(s, x_axis, y_axis) for s in series]
    parts += [_place(mark, x_axis, y_axis) for mark in chart.marks]
    drawing = svg_figure(chart.title, height, parts, chart.summary, shrinks=True)
    return drawing + (_legend(series) if len(series) > 1 else "")


def bars_svg(chart: Bars) -> str:
    """The whole histogram; an empty text without bars."""
    if not chart.bars:
        return ""
    left, right = _LEFT, WIDTH - _RIGHT
    y_axis = _from_zero(max(bar.value for bar in chart.bars), _TALL - _BOTTOM, _TOP)
    step = (right - left) / len(chart.bars)
    parts = [_rows(y_axis, chart.y_unit), svg_line(left, _TALL - _BOTTOM, right, _TALL - _BOTTOM, "axis")]
    every = _label_every([bar.label for bar in chart.bars], step)
    for index, bar in enumerate(chart.bars):
        x, y = left + index * step, y_axis.place(bar.value)
        gap = min(1.5, step / 8)
        parts.append(
            f'<g><rect x="{x + gap:.1f}" y="{y:.1f}" width="{step - 2 * gap:.1f}" '
            f'height="{_TALL - _BOTTOM - y:.1f}" class="column"/><title>{escape(bar.detail)}</title></g>'
        )
        if index % every == 0:
            parts.append(svg_text(x + step / 2, _TALL - _BOTTOM + 18, bar.label))
    parts.append(_names(chart.x_label, chart.y_label, _TALL))
    return svg_figure(chart.title, _TALL, parts, chart.summary, shrinks=True)


def _x_axis(chart: Lines, series: Sequence[Series]) -> Axis:
    xs = [x for s in series for x, y in s.points if y is not None] + [mark.x for mark in chart.marks]
    start, end = float(_LEFT), float(WIDTH - _RIGHT)
    if chart.is_log_x:
        low = min(x for x in xs if x > 0)
        return Axis(low, max(*xs, low * 1.5), start, end, is_log=True)
    low, high = min(xs), max(xs)
    return Axis(low, high if high > low else low + 1.0, start, end)


def _from_zero(top: float, start: float, end: float) -> Axis:
    """From 0 to a little above `top`."""
    return Axis(0.0, 1.06 * top if top > 0 else 1.0, start, end)


def _frame(chart: Lines, x_axis: Axis, y_axis: Axis, height: float) -> str:
    bottom = height - _BOTTOM
    parts = [_rows(y_axis, chart.y_unit)]
    for tick in _x_ticks(x_axis, chart.x_unit):
        x = x_axis.place(tick)
        parts.append(svg_line(x, bottom, x, bottom + 5, "axis"))
        parts.append(svg_text(x, bottom + 18, tick_text(tick, chart.x_unit)))
    parts.append(svg_line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis"))
    parts.append(_names(chart.x_label, chart.y_label, height))
    return "".join(parts)


def _x_ticks(axis: Axis, unit: str) -> list[float]:
    """As many of the axis's ticks as their texts leave room for; 1, 2, 5 where decades are few."""
    ticks = axis.ticks()
    if axis.is_log and len(ticks) < 4:
        first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
        decades = range(first, last + 1)
        ticks = [m * 10.0**e for e in decades for m in (1, 2, 5) if axis.low <= m * 10.0**e <= axis.high]
    taken, kept = -math.inf, list[float]()
    for tick in ticks:
        half = _CHARACTER * len(tick_text(tick, unit)) / 2 + 4
        x = axis.place(tick)
        if x - half >= taken and x + half <= WIDTH:
            kept.append(tick)
            taken = x + half
    return kept


def _rows(y_axis: Axis, unit: str) -> str:
    parts: list[str] = []
    ticks = y_axis.ticks()
    for tick in ticks if y_axis.start - y_axis.end > 150 else ticks[::2]:
        y = y_axis.place(tick)
        parts.append(svg_line(_LEFT, y, WIDTH - _RIGHT, y, "grid"))
        parts.append(svg_text(_LEFT - 7, y + 4, tick_text(tick, unit), anchor="end"))
    return "".join(parts)


def _names(x_label: str, y_label: str, height: float) -> str:
    middle = (height - _BOTTOM + _TOP) / 2
    return svg_text((_LEFT + WIDTH - _RIGHT) / 2, height - 12, x_label, "label") + (
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" class="label" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def _one_line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    look = series.look % _NUM_LOOKS
    parts: list[str] = []
    for run in _runs(series.points):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in run]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if series.is_area and len(run) > 1:
            ends = f"{places[-1][0]:.1f},{y_axis.start:.1f} {places[0][0]:.1f},{y_axis.start:.1f}"
            parts.append(f'<polygon points="{path} {ends}" class="area dot-{look}"/>')
        if len(run) > 1:
            parts.append(f'<polyline points="{path}" class="series series-{look}"/>')
        if series.has_dots or len(run) == 1:
            radius = 4 if series.has_dots else 2
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot-{look}"/>' for x, y in places
            ]
    return f"<g><title>{escape(series.name)}</title>{''.join(parts)}</g>"


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Unbroken stretches of a series."""
    runs: list[list[tuple[float, float]]] = []
    for is_there, group in itertools.groupby(points, key=lambda point: point[1] is not None):
        if is_there:
            runs.append([(x, y) for x, y in group if y is not None])
    return runs


def _place(mark: Mark, x_axis: Axis, y_axis: Axis) -> str:
    """A ring with a line down to the axis, and the label above its foot, on the side that has room."""
    x, y = x_axis.place(mark.x), y_axis.place(mark.y)
    width = _CHARACTER * len(mark.label)
    is_right = x - 10 - width < _LEFT
    text_x, anchor = (x + 10, "start") if is_right else (x - 10, "end")
    return (
        f"{svg_line(x, y, x, y_axis.start, 'guide')}"
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="place"/>'
        f"{svg_text(text_x, y_axis.start - 6, mark.label, 'point', anchor)}"
    )


def _legend(series: Sequence[Series]) -> str:
    items: list[str] = []
    for one in series:
        look = one.look % _NUM_LOOKS
        dot = f'<circle cx="14" cy="8" r="4" class="dot-{look}"/>' if one.has_dots else ""
        items.append(
            f'<li><svg viewBox="0 0 28 16" width="28" height="16" aria-hidden="true">'
            f'<line x1="1" y1="8" x2="27" y2="8" class="series series-{look}"/>{dot}</svg>'
            f"{escape(one.name)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _label_every(labels: Sequence[str], step: float) -> int:
    """How many bars share one label, so that labels do not touch."""
    widest = max((len(label) for label in labels), default=1) * _CHARACTER + 6
    return max(1, math.ceil(widest / step))
