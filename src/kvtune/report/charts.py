"""Figures as hand-written SVG: colours come from the page's style sheet, so light and dark work alike.

Kinds differ in shape as well as in colour. Geometry is in view-box units; text is never scaled below the
page's smallest size because the figure keeps a minimum width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kvtune.report.blocks import Interval, Intervals, Kind, Point, Scatter
from kvtune.report.record import tick_text

WIDTH = 560
HEIGHT = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 20, 18, 56
_SMALLEST_LOG = 1e-7

_KIND_NAMES: dict[Kind, str] = {
    "baseline": "baseline",
    "winner": "winner",
    "passed": "gate passed",
    "failed": "gate failed or error",
    "other": "not decided",
}


@dataclass(frozen=True, slots=True)
class Axis:
    """A mapping of [low, high] onto [start, end] in view-box units, linear or logarithmic, with ticks."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Position of a value; on a logarithmic axis what is below the range sits at its end."""
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values inside the range."""
        if self.is_log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, (last - first) // 5)
            return [10.0**exponent for exponent in range(first, last + 1, step)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first_tick = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first_tick, math.floor(self.high / step + 1e-9) + 1)]


def linear_axis(values: Sequence[float], start: float, end: float, *, from_zero: bool) -> Axis:
    """An axis around `values` with a margin of a twelfth on each side."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = low - span / 12, high + span / 12
    return Axis(min(0.0, low) if from_zero and min(values) >= 0 else low, high, start, end)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Whole decades around the positive values."""
    positive = [max(value, _SMALLEST_LOG) for value in values if value > 0] or [1e-3]
    low = 10.0 ** math.floor(math.log10(min(positive)) - 0.05)
    high = 10.0 ** math.ceil(math.log10(max(positive)) + 0.05)
    return Axis(low, high, start, end, is_log=True)


def scatter_svg(chart: Scatter) -> str:
    """The whole figure; an empty text when there is nothing to draw."""
    if not chart.points:
        return ""
    x_axis = linear_axis([p.x for p in chart.points], _LEFT, WIDTH - _RIGHT, from_zero=True)
    heights = [p.y for p in chart.points] + ([chart.limit] if chart.limit is not None else [])
    bottom, top = HEIGHT - _BOTTOM, _TOP
    y_axis = (
        log_axis(heights, bottom, top)
        if chart.is_log_y
        else linear_axis(heights, bottom, top, from_zero=True)
    )
    parts = [_frame(chart, x_axis, y_axis)]
    if chart.limit is not None:
        parts.append(_limit_line(chart, y_axis))
    if chart.has_front:
        parts.append(_front_line(chart.points, x_axis, y_axis))
    parts += [
        _marker(point, x_axis.place(point.x), y_axis.place(point.y)) for point in _drawing_order(chart.points)
    ]
    parts += _labels(chart, x_axis, y_axis)
    return svg_figure(chart.title, HEIGHT, parts, shrinks=True) + _legend(chart.points)


def _drawing_order(points: Sequence[Point]) -> list[Point]:
    order: list[Kind] = ["failed", "other", "passed", "baseline", "winner"]
    return sorted(points, key=lambda point: order.index(point.kind))


def svg_figure(
    title: str, height: float, parts: Sequence[str], summary: str = "", *, shrinks: bool = False
) -> str:
    """The drawing with its accessible name, and `summary` as its description. On a phone one that `shrinks`
    fits the screen with larger letters, others are scrolled."""
    description = f"<desc>{escape(summary)}</desc>" if summary else ""
    label = f"{title}. {summary}" if summary else title
    kind = ' class="shrinks"' if shrinks else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}"'
        f"{kind}>"
        f"<title>{escape(title)}</title>{description}{''.join(parts)}</svg>"
    )


def svg_text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def svg_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _frame(chart: Scatter, x_axis: Axis, y_axis: Axis) -> str:
    parts: list[str] = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(svg_line(_LEFT, y, WIDTH - _RIGHT, y, "grid"))
        parts.append(svg_text(_LEFT - 8, y + 4, tick_text(tick, chart.y_unit), anchor="end"))
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(svg_line(x, HEIGHT - _BOTTOM, x, HEIGHT - _BOTTOM + 5, "axis"))
        parts.append(svg_text(x, HEIGHT - _BOTTOM + 19, tick_text(tick, chart.x_unit)))
    parts.append(svg_line(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM, "axis"))
    parts.append(svg_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 12, chart.x_label, "label"))
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text transform="translate(15 {middle:.0f}) rotate(-90)" class="label" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>"
    )
    return "".join(parts)


def _limit_line(chart: Scatter, y_axis: Axis) -> str:
    y = y_axis.place(chart.limit or 0.0)
    return svg_line(_LEFT, y, WIDTH - _RIGHT, y, "limit") + svg_text(
        WIDTH - _RIGHT - 4, y - 6, chart.limit_label, "limit-text", "end"
    )


def _front_line(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Steps through the points that no other passing point beats in both directions."""
    best = math.inf
    steps: list[str] = []
    for point in sorted((p for p in points if p.kind not in ("failed", "other")), key=lambda p: (p.x, p.y)):
        if point.y < best:
            best = point.y
            steps.append(f"{x_axis.place(point.x):.1f},{y_axis.place(point.y):.1f}")
    return f'<polyline points="{" ".join(steps)}" class="front"/>' if len(steps) > 1 else ""


def _marker(point: Point, x: float, y: float) -> str:
    return f"<g>{_SHAPES[point.kind](x, y)}<title>{escape(point.detail)}</title></g>"


def _square(x: float, y: float) -> str:
    return f'<rect x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12" class="m-baseline"/>'


def _disc(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="m-passed"/>'


def _cross(x: float, y: float) -> str:
    return f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m-10 0l10 -10" class="m-failed"/>'


def _triangle(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 11h-12z" class="m-other"/>'


def _star(x: float, y: float) -> str:
    corners: list[str] = []
    for index in range(10):
        angle = math.pi * index / 5 - math.pi / 2
        reach = 10.5 if index % 2 == 0 else 4.7
        corners.append(f"{x + reach * math.cos(angle):.1f} {y + reach * math.sin(angle):.1f}")
    return f'<path d="M{"L".join(corners)}Z" class="m-winner"/>'


_SHAPES: Mapping[str, Callable[[float, float], str]] = {
    "baseline": _square,
    "winner": _star,
    "passed": _disc,
    "failed": _cross,
    "other": _triangle,
}


def _labels(chart: Scatter, x_axis: Axis, y_axis: Axis) -> list[str]:
    """One label per distinct name, the most important point's, where it covers no other label or marker."""
    points = chart.points
    markers = [(x_axis.place(p.x), y_axis.place(p.y)) for p in points]
    taken: list[tuple[float, float, float, float]] = [(x - 7, y - 7, x + 7, y + 7) for x, y in set(markers)]
    if chart.limit is not None:
        y, width = y_axis.place(chart.limit), 6.6 * len(chart.limit_label)
        taken.append((WIDTH - _RIGHT - 4 - width, y - 18, WIDTH - _RIGHT, y + 2))
    parts: list[str] = []
    named: set[str] = set()
    for point in reversed(_drawing_order(points)):
        if point.label in named:
            continue
        x, y = x_axis.place(point.x), y_axis.place(point.y)
        box = _free_box(x, y, 6.6 * len(point.label), taken)
        if box is None:
            continue
        named.add(point.label)
        taken.append(box)
        is_key = point.kind in ("baseline", "winner")
        place, anchor = (box[2], "end") if box[2] <= x else (box[0], "start")  # larger letters grow outwards
        parts.append(svg_text(place, box[3] - 3, point.label, "point" if is_key else "point minor", anchor))
    return parts


def _free_box(
    x: float, y: float, width: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float, float, float] | None:
    """The first of six places around a marker that is inside the frame and free."""
    corners = (
        (x + 11, y - 7), (x - 11 - width, y - 7), (x - width / 2, y - 24), (x - width / 2, y + 10),
        (x + 8, y - 22), (x + 8, y + 8),
    )  # fmt: skip
    for left, top in corners:
        box = (left, top, left + width, top + 14)
        inside = box[0] > _LEFT and box[2] < WIDTH - 2 and box[1] > 2 and box[3] < HEIGHT - _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(points: Sequence[Point]) -> str:
    return kind_legend([kind for kind in _KIND_NAMES if any(point.kind == kind for point in points)])


def kind_legend(kinds: Sequence[Kind]) -> str:
    """Marker and name of each kind of trial."""
    items = "".join(
        f'<li><svg viewBox="0 0 24 24" width="16" height="16" aria-hidden="true">'
        f"{_marker(Point(0, 0, '', kind, _KIND_NAMES[kind]), 12, 12)}</svg>{_KIND_NAMES[kind]}</li>"
        for kind in kinds
    )
    return f'<ul class="legend">{items}</ul>'


def intervals_svg(chart: Intervals) -> str:
    """Rows of value and interval around one reference line; an empty text when there are none."""
    if not chart.rows:
        return ""
    row_height, top, left = 34, 30, 205
    height = top + row_height * len(chart.rows) + 52
    edges = [edge for row in chart.rows for edge in (row.low, row.high)] + [chart.reference]
    axis = linear_axis(edges, left, WIDTH - 28, from_zero=False)
    bottom = height - 46
    parts = [svg_line(axis.place(t), top - 6, axis.place(t), bottom, "grid") for t in axis.ticks()]
    parts += [svg_text(axis.place(tick), bottom + 17, tick_text(tick)) for tick in axis.ticks()]
    x = axis.place(chart.reference)
    parts += [
        svg_line(x, top - 8, x, bottom, "limit"),
        svg_text(x, top - 14, chart.reference_label, "limit-text"),
    ]
    for index, row in enumerate(chart.rows):
        parts.append(_interval_row(row, axis, top + row_height * (index + 0.5), left))
    parts.append(svg_text((left + WIDTH - 28) / 2, height - 8, chart.x_label, "label"))
    return svg_figure(chart.title, height, parts, shrinks=True)


def _interval_row(row: Interval, axis: Axis, y: float, left: float) -> str:
    low, value, high = axis.place(row.low), axis.place(row.value), axis.place(row.high)
    tone = row.tone or "plain"
    return (
        f"<g><title>{escape(row.note)}</title>{svg_text(left - 12, y + 4, row.label, 'row', 'end')}"
        f"{svg_line(low, y, high, y, f'bar t-{tone}')}{svg_line(low, y - 5, low, y + 5, f'cap t-{tone}')}"
        f"{svg_line(high, y - 5, high, y + 5, f'cap t-{tone}')}"
        f'<circle cx="{value:.1f}" cy="{y:.1f}" r="5" class="dot t-{tone}"/></g>'
    )
