"""What a page says of a workload: lengths, reuse, arrivals, as `kvtune trace` counted them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report.blocks import Bar, Bars, Block, Cell, Facts, Paragraph, Section, Table, cell
from kvtune.report.record import NOT_RECORDED, as_mapping, as_sequence, find, number, show_number

__all__ = ["rate_cell", "rate_text", "workload_section"]


def rate_text(value: Any) -> str:
    """A share of one as percent."""
    share = number(value)
    return NOT_RECORDED if share is None else f"{100 * share:.1f} %"


def rate_cell(value: Any, *, test_id: str = "") -> Cell:
    """A share as percent; the recorded value is the share itself."""
    text = rate_text(value)
    return Cell(text, value, test_id, "muted" if text == NOT_RECORDED else "")


def workload_section(statistics: Mapping[str, Any]) -> Section | None:
    """None where there are no statistics."""
    if not statistics:
        return None
    figures = [
        _lengths(find(statistics, "input_tokens"), "Prompt lengths", "prompt"),
        _lengths(find(statistics, "output_tokens"), "Output lengths", "output"),
        _reuse_times(find(statistics, "reuse.reused_within_s")),
        _depths(find(statistics, "reuse.depth")),
    ]
    blocks: list[Block] = [_quantiles(statistics), _facts(statistics)]
    blocks += [figure for figure in figures if figure is not None]
    verdict = as_mapping(find(statistics, "stationarity"))
    reasons = [str(reason) for reason in as_sequence(verdict.get("reasons"))]
    if verdict.get("verdict") == "drifting":
        text = "This traffic changes while it is recorded, so its past is no guide to its future"
        blocks.insert(0, Paragraph(f"{text}: {'; '.join(reasons)}.", "warn"))
    return Section("Workload", tuple(blocks))


def _quantiles(statistics: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for key, name in (("input_tokens", "prompt"), ("output_tokens", "output")):
        found = as_mapping(statistics.get(key))
        unit = str(found.get("unit", "tokens"))
        rows.append(
            (
                Cell(f"{name}, {unit}"),
                *(
                    cell(found.get(level), test_id=f"workload.{key}.{level}")
                    for level in ("n", "mean", "p50", "p90", "p99", "max")
                ),
            )
        )
    return Table("Lengths", ("", "n", "mean", "p50", "p90", "p99", "max"), tuple(rows))


def _facts(statistics: Mapping[str, Any]) -> Facts:
    never = find(statistics, "reuse.popularity.never_reused_share")
    tenth = find(statistics, "reuse.popularity.top_tenth_share_of_reuse")
    gaps = as_mapping(find(statistics, "reuse.gaps.seconds"))
    return Facts(
        (
            ("requests", cell(statistics.get("num_requests"), test_id="workload.num_requests")),
            ("sessions", cell(statistics.get("num_sessions"), test_id="workload.num_sessions")),
            ("duration", cell(statistics.get("duration_s"), "s", test_id="workload.duration_s")),
            ("arrivals per s", cell(find(statistics, "arrivals.rate_per_s"))),
            ("arrivals", cell(find(statistics, "arrivals.kind"))),
            (
                "prompt tokens an endless cache would hit",
                rate_cell(
                    find(statistics, "prefix.ideal_token_hit_rate"), test_id="workload.ideal_token_hit_rate"
                ),
            ),
            ("blocks never reused", rate_cell(never, test_id="workload.never_reused_share")),
            ("reuse that falls on a tenth of the blocks", rate_cell(tenth)),
            ("time between two uses, p50", cell(gaps.get("p50"), "s", test_id="workload.gap_p50_s")),
            ("time between two uses, p90", cell(gaps.get("p90"), "s")),
        )
    )


def _lengths(found: Any, title: str, what: str) -> Bars | None:
    fields = as_mapping(found)
    edges = [number(e) for e in as_sequence(find(fields, "histogram.edges"))]
    counts = [number(c) for c in as_sequence(find(fields, "histogram.counts"))]
    if not counts or len(edges) != len(counts) + 1 or None in edges or None in counts:
        return None
    unit = str(fields.get("unit", "tokens"))
    bars: list[Bar] = []
    for index, count in enumerate(counts):
        low, high = edges[index] or 0.0, edges[index + 1] or 0.0
        bars.append(
            Bar(_short(low), count or 0.0, f"{low:,.0f} to {high:,.0f} {unit}: {count:,.0f} requests")
        )
    summary = ", ".join(
        f"{level} {show_number(value)}"
        for level in ("p50", "p90", "p99")
        if (value := number(fields.get(level))) is not None
    )
    return Bars(title, f"{what} length, {unit}", "requests", tuple(bars), f"{summary} {unit}.")


def _short(value: float) -> str:
    """A bar's lower edge in at most five characters."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2g}{letter}" if value < 100 * size else f"{value / size:.0f}{letter}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _reuse_times(found: Any) -> Bars | None:
    """Cumulative: Kaplan-Meier shares of uses followed by another within each time."""
    pairs = [(float(key), number(share)) for key, share in as_mapping(found).items()]
    known = [(limit, share) for limit, share in sorted(pairs) if share is not None]
    if not known:
        return None
    bars = tuple(
        Bar(_duration(limit), 100 * share, f"within {_duration(limit)}: {100 * share:.1f} % of uses")
        for limit, share in known
    )
    last, most = known[-1]
    summary = f"{100 * most:.1f} % of block uses are followed by another within {_duration(last)}."
    return Bars("How soon a block is used again", "within", "share of uses", bars, summary, y_unit="%")


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _depths(found: Any) -> Bars | None:
    rows = [as_mapping(row) for row in as_sequence(found)]
    bars: list[Bar] = []
    for row in rows:
        rate, start = number(row.get("hit_rate")), number(row.get("from_block"))
        if rate is None or start is None:
            continue
        detail = (
            f"blocks {start:,.0f} to {(number(row.get('to_block')) or 0) - 1:,.0f}: {100 * rate:.1f} % of "
            f"{number(row.get('references')) or 0:,.0f} references seen before"
        )
        bars.append(Bar(_short(start), 100 * rate, detail))
    if not bars:
        return None
    summary = f"From {bars[0].value:.0f} % in the first block to {bars[-1].value:.0f} % in the deepest."
    return Bars(
        "Blocks seen before, by place in the prompt", "from block", "seen before", tuple(bars), summary,
        y_unit="%",
    )  # fmt: skip
