"""Baseline against winner, metric by metric, and the noise that no difference can be seen below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import (
    Block,
    Cell,
    Interval,
    Intervals,
    Paragraph,
    Section,
    Table,
    Tone,
    placed,
    placed_figure,
    verdict_cell,
)
from kvtune.report.decision import is_worse
from kvtune.report.record import Place, as_mapping, figure, find, metric_label, show_number, unit_of

__all__ = ["comparison_section", "noise_section", "rejected_section"]

DISTRIBUTION = frozenset(("p50", "p95", "p99"))


def comparison_section(result: Mapping[str, Any]) -> Section:
    """Every measured figure of both sides; ratios with bounds where runs can be paired."""
    root = Place(result)
    gains = as_mapping(find(result, "gain"))
    flat = [_flat(root.at(side, "metrics")) for side in ("baseline", "winner")]
    names = list(dict.fromkeys([*gains, *flat[0], *flat[1]]))
    rows = tuple(_row(root, name, flat) for name in names)
    caption = 'Ratios are winner / baseline; "noise" means that no difference is proven'
    table = Table(caption, ("Metric", "Baseline", "Winner", "Ratio", "Reading"), rows)
    figure_rows = tuple(row for row in (_interval(name, entry) for name, entry in gains.items()) if row)
    chart = Intervals("Winner against baseline", "ratio, winner / baseline", figure_rows, 1.0, "baseline")
    blocks: list[Block] = [chart, table if rows else Paragraph(record.NOT_RECORDED, "warn")]
    if not record.number(find(result, "price_per_hour")):
        blocks.append(
            Paragraph("Cost per million tokens: not recorded (no --price-per-hour was given).", "muted")
        )
    return Section("Baseline against winner", tuple(blocks))


def _row(root: Place, name: str, flat: Sequence[Mapping[str, Place]]) -> tuple[Cell, ...]:
    unit = unit_of(name.partition(".")[0])
    gain = root.at("gain", name)
    reading, tone = _reading(name, gain.value)
    sides = [side.get(name) for side in flat]
    cells = [
        Cell("-") if place is None else placed_figure(place, unit, test_id=f"{which}.{name}")
        for place, which in zip(sides, ("baseline", "winner"), strict=True)
    ]
    if name == "requests_held":
        cells = [
            placed_figure(root.at("held", which), test_id=f"held.{which}") for which in ("baseline", "winner")
        ]
    return (
        Cell(metric_label(name)),
        *cells,
        Cell("-") if gain.value is None else placed_figure(gain, "ratio", test_id=f"gain.{name}"),
        Cell(reading, test_id=f"reading.{name}", tone=tone),
    )


def _flat(metrics: Place) -> dict[str, Place]:
    """Every number of a metrics mapping by name; distributions give one name per statistic."""
    names: dict[str, Place] = {}
    for name, place in metrics.items():
        inner = as_mapping(place.value)
        if inner and DISTRIBUTION & inner.keys():
            leaves = {f"{name}.{key}": leaf for key, leaf in place.items() if key != "n"}
            names |= leaves | {f"{name}.mean": place}  # a distribution reads as its mean with n
        elif figure(place.value).value is not None:
            names[name] = place
    return names


def _reading(name: str, gain: Any) -> tuple[str, Tone]:
    ratio = figure(gain).value
    if ratio is None:
        return "", ""
    significant = as_mapping(gain).get("significant")
    if significant is None:
        return "interval " + record.NOT_RECORDED, "muted"
    if not significant:
        return "noise", "muted"
    worse = is_worse(name, ratio)
    return ("equal", "") if worse is None else ("worse", "bad") if worse else ("better", "good")


def _interval(name: str, entry: Any) -> Interval | None:
    shown = figure(entry)
    if shown.value is None:
        return None
    low = shown.value if shown.low is None else shown.low
    high = shown.value if shown.high is None else shown.high
    reading, tone = _reading(name, entry)
    label = metric_label(name)
    note = f"{label}: {show_number(shown.value)} ({record.show_interval(shown)}) {reading}"
    return Interval(label, low, shown.value, high, tone, note)


# ---------------------------------------------------------------- noise


def noise_section(result: Mapping[str, Any]) -> Section:
    """The baseline against itself."""
    noise = Place(result).at("aa_noise")
    intro = Paragraph(
        "The same baseline, run and replayed twice. No difference smaller than this can be seen; a gain "
        "counts only beyond it."
    )
    rows: list[tuple[Cell, ...]] = []
    drawn: list[Interval] = []
    for name, place in noise.items():
        if name.endswith("_floor"):
            label = f"{metric_label(name.removesuffix('_floor'))} of another chunking"
            rows.append((Cell(label), placed(place, test_id=f"aa.{name}")))
            continue
        rows.append((Cell(metric_label(name)), placed_figure(place, "ratio", test_id=f"aa.{name}")))
        row = _interval(name, place.value)
        drawn += [row] if row and as_mapping(place.value) else []
    chart = Intervals("Baseline against itself", "ratio of two runs", tuple(drawn), 1.0, "equal")
    table = Table("A/A: ratios of runs, and divergence of replays", ("Metric", "Measured"), tuple(rows))
    blocks: tuple[Block, ...] = (chart, table) if rows else (Paragraph(record.NOT_RECORDED, "warn"),)
    return Section("Noise of the measurement (A/A)", (intro, *blocks))


# ---------------------------------------------------------------- what was not confirmed


def rejected_section(result: Mapping[str, Any]) -> Section | None:
    """Candidates that the confirmation turned down, each with its reason."""
    rejected = Place(result).at("rejected").elements()
    if not rejected:
        return None
    rows = tuple(
        (
            Cell(record.long_config(place.at("config").value), pointer=place.at("config").pointer),
            verdict_cell(place.at("quality", "verdict").value),
            placed(place.at("reason"), test_id=f"rejected.{index}"),
        )
        for index, place in enumerate(rejected)
    )
    text = "Better in the search, not confirmed on requests that the search never saw:"
    table = Table("Rejected in the confirmation", ("Configuration", "Verdict", "Why"), rows)
    return Section("Not confirmed", (Paragraph(text), table))
