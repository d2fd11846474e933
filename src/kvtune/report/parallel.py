"""Parallel coordinates as hand-written SVG: each trial a line through its settings and its results."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvtune.report.blocks import Axis, Kind, Parallel, Strand
from kvtune.report.charts import Axis as Scale
from kvtune.report.charts import kind_legend, linear_axis, log_axis, svg_line, svg_text
from kvtune.report.record import tick_text

__all__ = ["parallel_svg"]

_WIDTH, _STEP, _LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 1080, 118, 90, 60, 34, 22, 330
_ORDER: tuple[Kind, ...] = ("failed", "other", "passed", "baseline", "winner")


def parallel_svg(chart: Parallel) -> str:
    """The whole figure with its legend; an empty text without trials or with fewer than two axes."""
    if len(chart.axes) < 2 or not chart.strands:
        return ""
    step = max(_STEP, (_WIDTH - _LEFT - _RIGHT) / (len(chart.axes) - 1))
    width = _LEFT + step * (len(chart.axes) - 1) + _RIGHT
    scales = [_scale(axis, [s.values[i] for s in chart.strands]) for i, axis in enumerate(chart.axes)]
    order = sorted(chart.strands, key=lambda strand: _ORDER.index(strand.kind))
    parts = [_strand(strand, scales, step) for strand in order]
    parts += [
        _axis(axis, scale, _LEFT + step * i)
        for i, (axis, scale) in enumerate(zip(chart.axes, scales, strict=True))
    ]
    kinds: list[Kind] = [kind for kind in reversed(_ORDER) if any(s.kind == kind for s in chart.strands)]
    label = f"{chart.title}. {chart.summary}"
    drawing = (
        f'<svg viewBox="0 0 {width:.0f} {_HEIGHT}" role="img" aria-label="{escape(label)}" class="wide">'
        f"<title>{escape(chart.title)}</title><desc>{escape(chart.summary)}</desc>{''.join(parts)}</svg>"
    )
    return drawing + kind_legend(kinds)


def _scale(axis: Axis, values: Sequence[float | None]) -> Scale:
    start, end = float(_HEIGHT - _BOTTOM), float(_TOP)
    if axis.names:
        margin = 0.35
        return Scale(-margin, len(axis.names) - 1 + margin, start, end)
    found = [value for value in values if value is not None] or [0.0]
    if axis.is_log:
        return log_axis(found, start, end)
    return linear_axis(found, start, end, from_zero=True)


def _axis(axis: Axis, scale: Scale, x: float) -> str:
    parts = [svg_line(x, _TOP, x, _HEIGHT - _BOTTOM, "axis"), svg_text(x, 16, axis.label, "label")]
    ticks = (
        list(enumerate(axis.names)) if axis.names else [(t, tick_text(t, axis.unit)) for t in scale.ticks()]
    )
    for value, name in ticks:
        y = scale.place(float(value))
        parts.append(svg_line(x - 4, y, x + 4, y, "axis"))
        parts.append(svg_text(x - 8, y + 4, name, "tick halo", "end"))
    return "".join(parts)


def _strand(strand: Strand, scales: Sequence[Scale], step: float) -> str:
    """Broken where the trial was not measured."""
    runs: list[list[str]] = [[]]
    for i, (value, scale) in enumerate(zip(strand.values, scales, strict=True)):
        if value is None:
            runs.append([])
            continue
        runs[-1].append(f"{_LEFT + step * i:.1f},{scale.place(value):.1f}")
    lines = "".join(
        f'<polyline points="{" ".join(run)}" class="strand s-{strand.kind}"/>' for run in runs if len(run) > 1
    )
    return f"<g><title>{escape(strand.detail)}</title>{lines}</g>"
