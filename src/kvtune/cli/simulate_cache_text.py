"""The terminal tables of `kvtune simulate --mode cache`."""

from __future__ import annotations

from typing import Any

from kvtune.cli.table import text_table
from kvtune.config import format_bytes

__all__ = ["as_text"]

_BOUNDS = ("lru", "optimal_pinned", "optimal")
"""Policies that are no candidates to close the gap: they span it."""


def as_text(record: dict[str, Any], *, most_tenants: int) -> str:
    """The record of `simulate --mode cache` as a few small tables."""
    lines = [
        f"{record['path']}: {record['num_requests']:,} requests, {record['blocks_total']:,} blocks of "
        f"{record['block_size']} tokens, {record['unique_blocks']:,} distinct",
        "",
        "Hit blocks, of all prompt blocks",
        *_hits_table(record),
        *_curve(record),
        "",
        "What would lift lru, in points of hit rate",
        *_what_if_table(record),
    ]
    if len(record["tenants"]) > 1:
        lines += ["", *_tenants_table(record, most_tenants)]
    return "\n".join([*lines, "", *(f"- {note}" for note in record["notes"])]).rstrip()


def _curve(record: dict[str, Any]) -> list[str]:
    from kvtune.report.terminal import curve_lines

    lines = curve_lines(record)
    return ["", "Hit blocks of lru by cache size", *lines] if lines else []


def _sizes(record: dict[str, Any]) -> list[str]:
    return ["blocks"] if record["block_bytes"] is None else ["blocks", "memory"]


def _size(row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    capacity, size = row["capacity_blocks"], row["capacity_bytes"]
    cells = [capacity if isinstance(capacity, str) else f"{capacity:,}"]
    if record["block_bytes"] is not None:
        cells.append("-" if size is None else format_bytes(size))
    return cells


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _hits_table(record: dict[str, Any]) -> list[str]:
    """Block hit rates: LRU, the asked policies with the share of the gap they close, the best possible."""
    asked = [name for name in record["capacities"][0]["policies"] if name not in _BOUNDS]
    bound = ["optimal"] if "optimal" in record["capacities"][0]["policies"] else []
    head = [*_sizes(record), "lru"]
    for name in asked:
        head += [name, "of the gap"]
    rows: list[list[str]] = []
    for row in record["capacities"]:
        cells = [*_size(row, record), _share(row["lru"]["block_hit_rate"])]
        for name in asked:
            found = row["policies"][name]
            cells += [_share(found["block_hit_rate"]), _share(found["gap_closed"])]
        cells.append(_share(row["oracle"]["block_hit_rate"]))
        rows.append([*cells, *(_share(row["policies"][name]["block_hit_rate"]) for name in bound)])
    return text_table([*head, "best possible", *bound], rows, left=0)


def _what_if_table(record: dict[str, Any]) -> list[str]:
    """Points of block hit rate above LRU at each size."""
    more = record["more_memory"]
    head = [*_sizes(record), "half the bytes per block", *([] if more is None else [f"{more['asked']} more"])]
    rows: list[list[str]] = []
    for row in record["capacities"]:
        what_if = row["what_if"]
        cells = [*_size(row, record), _points(what_if["half_bytes_per_block"]["block_hit_rate_gain"])]
        if more is not None:
            cells.append(_points(what_if["more_memory"]["block_hit_rate_gain"]))
        gap = row["oracle"]["block_hit_rate"] - row["lru"]["block_hit_rate"]
        needed = row["lru_blocks_for_oracle"]
        rows.append([*cells, _points(gap), "-" if needed is None else f"{needed:,}"])
    return text_table([*head, "best possible policy", "blocks lru needs for that"], rows, left=0)


def _tenants_table(record: dict[str, Any], most: int) -> list[str]:
    tenants = record["tenants"]
    title = f"Tenants: {record['policy']} at {record['capacity_blocks']} blocks"
    if len(tenants) > most:
        title += f", the largest {most} of {len(tenants):,}"
    rows = [
        [
            row["tenant"] or "(none)",
            f"{row['num_requests']:,}",
            _share(row["block_hit_rate"]),
            _share(row["token_hit_rate"]),
        ]
        for row in tenants[:most]
    ]
    return [title, *text_table(["tenant", "requests", "hit blocks", "hit tokens"], rows)]
