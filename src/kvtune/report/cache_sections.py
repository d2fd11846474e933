"""What a page says of prefix caches on a trace: the curve, the policies, what would lift the hit rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvtune.report.blocks import (
    Block,
    Cell,
    Facts,
    Interval,
    Intervals,
    Lines,
    Mark,
    Paragraph,
    Section,
    Series,
    Table,
    cell,
)
from kvtune.report.record import NOT_RECORDED, as_mapping, as_sequence, find, number, show_number
from kvtune.report.workload_sections import rate_cell, rate_text

__all__ = ["cache_answer", "cache_sections"]

_BOUNDS: Final = ("lru", "optimal", "optimal_pinned")
_HALF_GAIN: Final = "what_if.half_bytes_per_block.block_hit_rate_gain"
_MOST_TENANTS: Final = 20


def cache_answer(record: Mapping[str, Any]) -> Section:
    """One size in a sentence and six figures: of several the one where more blocks would buy most."""
    rows = _rows(record)
    if not rows:
        return Section("Answer", (Paragraph("No cache size was replayed.", "warn"),))
    row = max(rows, key=lambda row: number(find(row, _HALF_GAIN)) or 0.0)
    policy, size = str(record.get("policy", NOT_RECORDED)), _size_text(row, record)
    found, half = _of_policy(row, policy), as_mapping(find(row, "what_if.half_bytes_per_block"))
    lru, oracle = find(row, "lru.block_hit_rate"), find(row, "oracle.block_hit_rate")
    text = (
        f"{policy} hits {rate_text(found.get('block_hit_rate'))} of the prompt blocks with {size}; "
        f"lru {rate_text(lru)}, the best any engine could do {rate_text(oracle)}. "
        f"Half the bytes per block would lift lru to {rate_text(half.get('block_hit_rate'))}."
    )
    knee, enough = as_mapping(find(record, "curve.knee")), as_mapping(find(record, "curve.enough"))
    facts = Facts(
        (
            (f"{policy}, blocks hit", rate_cell(found.get("block_hit_rate"), test_id="block_hit_rate")),
            (f"{policy}, tokens hit", rate_cell(found.get("token_hit_rate"), test_id="token_hit_rate")),
            ("best possible", rate_cell(oracle, test_id="oracle")),
            ("lru with twice the blocks", rate_cell(half.get("block_hit_rate"), test_id="half-bytes")),
            ("knee of the lru curve", _blocks_cell(knee.get("capacity_blocks"), record, "knee")),
            ("90 % of all hits from", _blocks_cell(enough.get("capacity_blocks"), record, "enough")),
        ),
        is_headline=True,
    )
    return Section("Answer", (Paragraph(text, "good"), facts))


def cache_sections(record: Mapping[str, Any]) -> list[Section]:
    """Curve, policies, what-ifs and tenants of a record of `simulate --mode cache`."""
    rows = _rows(record)
    if not rows:
        return []
    sections = [Section("Hit rate by cache size", _curve_blocks(record, rows))]
    sections.append(Section("Eviction policies", (_policy_table(record, rows), *_gap_figures(record, rows))))
    sections.append(Section("What would lift the hit rate", (_what_if_table(record, rows),)))
    tenants = [as_mapping(row) for row in as_sequence(record.get("tenants"))]
    if len(tenants) > 1:
        sections.append(Section("Tenants", (_tenant_table(record, tenants),)))
    return sections


def _rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [as_mapping(row) for row in as_sequence(record.get("capacities"))]


def _policies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Policies that were asked for and are no bound."""
    return [name for name in as_mapping(rows[0].get("policies")) if name not in _BOUNDS]


def _blocks_cell(value: Any, record: Mapping[str, Any], test_id: str) -> Cell:
    count, size = number(value), number(record.get("block_bytes"))
    if count is None:
        return cell(None, test_id=test_id)
    memory = "" if size is None else f", {show_number(count * size, 'bytes')}"
    return Cell(f"{count:,.0f} blocks{memory}", value, test_id)


def _size_text(row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    capacity = row.get("capacity_blocks")
    if number(capacity) is None:
        return "an unbounded cache"
    tokens = show_number(number(record.get("block_size")) or 0)
    size = row.get("capacity_bytes")
    memory = "" if size is None else f" ({show_number(size, 'bytes')})"
    return f"{capacity:,} blocks of {tokens} tokens{memory}"


# --- the curve


def _curve_blocks(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[Block, ...]:
    points = [as_mapping(point) for point in as_sequence(find(record, "curve.points"))]
    series = [
        Series("lru, exact at every size", _pairs(points, "block_hit_rate"), 0),
        Series("best possible", _column(rows, "oracle.block_hit_rate"), 1, has_dots=True),
    ]
    for index, name in enumerate(_policies(rows)[:4]):
        series.append(Series(name, _policy_column(rows, name), 2 + index, has_dots=True))
    knee = as_mapping(find(record, "curve.knee"))
    at, height = number(knee.get("capacity_blocks")), number(knee.get("block_hit_rate"))
    marks: tuple[Mark, ...] = ()
    if at and height is not None:
        marks = (Mark(at, 100 * height, f"knee: {at:,.0f} blocks, {100 * height:.1f} %"),)
    figure = Lines(
        "Blocks hit by cache size", "cache size, blocks", "prompt blocks hit",
        tuple(s for s in series if s.points), _curve_summary(record), y_unit="%", is_log_x=True, marks=marks,
    )  # fmt: skip
    text = (
        "The knee is where another block begins to buy less than the average block does. The best possible "
        "is the offline optimum that must admit every request, which no engine can beat."
    )
    return (figure, Paragraph(text))


def _curve_summary(record: Mapping[str, Any]) -> str:
    knee, most = as_mapping(find(record, "curve.knee")), as_mapping(find(record, "curve.unbounded"))
    at = number(knee.get("capacity_blocks"))
    if at is None:
        return "The replayed sizes are in the table below."
    return (
        f"Lru hits {rate_text(knee.get('block_hit_rate'))} at the knee of {at:,.0f} blocks and "
        f"{rate_text(most.get('block_hit_rate'))} without a bound."
    )


def _pairs(points: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float | None], ...]:
    found = [(number(point.get("capacity_blocks")), number(point.get(key))) for point in points]
    return tuple((x, 100 * y) for x, y in found if x is not None and y is not None and x > 0)


def _column(rows: Sequence[Mapping[str, Any]], path: str) -> tuple[tuple[float, float | None], ...]:
    found = sorted(
        (x, 100 * y)
        for row in rows
        if (x := number(row.get("capacity_blocks"))) is not None
        and (y := number(find(row, path))) is not None
    )
    return tuple(found)


def _policy_column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[float, float | None], ...]:
    values = [
        {"capacity_blocks": row.get("capacity_blocks"), "y": _of_policy(row, name).get("block_hit_rate")}
        for row in rows
    ]
    return tuple(sorted(_pairs(values, "y")))


def _of_policy(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return as_mapping(as_mapping(row.get("policies")).get(name))  # a policy's name may hold a dot


# --- the policies


def _policy_table(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Table:
    names = _policies(rows)
    headers = ["blocks", "memory", "lru"]
    for name in names:
        headers += [name, "of the gap"]
    body: list[tuple[Cell, ...]] = []
    for index, row in enumerate(rows):
        prefix = f"capacity.{index}"
        cells = [
            *_size_cells(row, prefix),
            rate_cell(find(row, "lru.block_hit_rate"), test_id=f"{prefix}.lru"),
        ]
        for name in names:
            found = _of_policy(row, name)
            cells.append(rate_cell(found.get("block_hit_rate"), test_id=f"{prefix}.{name}"))
            cells.append(_gap_cell(found.get("gap_closed"), f"{prefix}.{name}.gap"))
        cells.append(rate_cell(find(row, "oracle.block_hit_rate"), test_id=f"{prefix}.oracle"))
        body.append(tuple(cells))
    caption = "Share of prompt blocks hit; of the gap: the part of the way from lru to the best possible"
    return Table(caption, (*headers, "best possible"), tuple(body))


def _size_cells(row: Mapping[str, Any], prefix: str) -> list[Cell]:
    capacity = row.get("capacity_blocks")
    text = f"{capacity:,}" if isinstance(capacity, int) else "unbounded"
    size = row.get("capacity_bytes")
    memory = Cell("–") if size is None else cell(size, "bytes", test_id=f"{prefix}.bytes")
    return [Cell(text, capacity, f"{prefix}.blocks"), memory]


def _gap_cell(value: Any, test_id: str) -> Cell:
    share = number(value)
    if share is None:
        return Cell("–")
    return Cell(
        f"{100 * share:+.0f} %", value, test_id, "good" if share > 0.005 else "bad" if share < -0.005 else ""
    )


def _gap_figures(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Each policy between lru and the best possible, at sizes where there is a gap."""
    most = number(find(record, "curve.unbounded.block_hit_rate"))
    figures: list[Block] = []
    for name in _policies(rows)[:4]:
        shown = [row for row in (_gap_row(row, name) for row in rows) if row is not None]
        if shown and most is not None:
            title = f"{name} between lru and the best possible"
            figures.append(
                Intervals(title, "prompt blocks hit, %", tuple(shown), 100 * most, "unbounded cache")
            )
    return figures


def _gap_row(row: Mapping[str, Any], name: str) -> Interval | None:
    lru, oracle = number(find(row, "lru.block_hit_rate")), number(find(row, "oracle.block_hit_rate"))
    value, capacity = number(_of_policy(row, name).get("block_hit_rate")), number(row.get("capacity_blocks"))
    if lru is None or oracle is None or value is None or capacity is None:
        return None
    note = f"lru {rate_text(lru)}, {name} {rate_text(value)}, best possible {rate_text(oracle)}"
    tone = "good" if value > lru else "bad" if value < lru else ""
    return Interval(f"{capacity:,.0f} blocks", 100 * lru, 100 * value, 100 * oracle, tone, note)


# --- what if


def _what_if_table(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Table:
    more = find(record, "more_memory.asked")
    headers = ["blocks", "memory", "lru", "half the bytes per block", *([f"{more} more"] if more else [])]
    body: list[tuple[Cell, ...]] = []
    for index, row in enumerate(rows):
        prefix = f"what-if.{index}"
        lru, oracle = number(find(row, "lru.block_hit_rate")), number(find(row, "oracle.block_hit_rate"))
        cells = [*_size_cells(row, prefix), rate_cell(lru)]
        for key in ("half_bytes_per_block", *(("more_memory",) if more else ())):
            cells.append(_points_cell(find(row, f"what_if.{key}.block_hit_rate_gain"), f"{prefix}.{key}"))
        gap = None if lru is None or oracle is None else oracle - lru
        cells.append(_points_cell(gap, ""))
        cells.append(cell(row.get("lru_blocks_for_oracle"), test_id=f"{prefix}.lru_blocks_for_oracle"))
        body.append(tuple(cells))
    caption = "Points of block hit rate above lru at the same size"
    return Table(caption, (*headers, "best possible policy", "blocks lru needs for that"), tuple(body))


def _points_cell(value: Any, test_id: str) -> Cell:
    points = number(value)
    return Cell("–") if points is None else Cell(f"{100 * points:+.1f}", value, test_id)


def _tenant_table(record: Mapping[str, Any], tenants: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            Cell(str(row.get("tenant") or "(none)")),
            cell(row.get("num_requests")),
            rate_cell(row.get("block_hit_rate"), test_id=f"tenant.{index}.block_hit_rate"),
            rate_cell(row.get("token_hit_rate")),
        )
        for index, row in enumerate(tenants[:_MOST_TENANTS])
    ]
    shown = "" if len(tenants) <= _MOST_TENANTS else f", the largest {_MOST_TENANTS} of {len(tenants):,}"
    caption = f"{record.get('policy')} at {record.get('capacity_blocks')} blocks{shown}"
    return Table(caption, ("tenant", "requests", "blocks hit", "tokens hit"), tuple(rows))
