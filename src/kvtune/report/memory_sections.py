"""KV memory, predicted beside measured, at the moments of a server's life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import Block, Cell, Paragraph, Section, Table, placed
from kvtune.report.record import Place, as_mapping, number, show

__all__ = ["memory_section"]

HEADERS = ("Moment", "Requests", "Tokens held", "Pool, predicted", "Pool, measured", "In use, predicted",
           "In use, measured", "Predicted right", "Whole process")  # fmt: skip


def memory_section(result: Mapping[str, Any]) -> Section:
    """A table per side; a sentence where the engine does not tell."""
    root = Place(result).at("memory")
    title = "Memory, predicted and measured"
    note = as_mapping(root.value).get("note")
    tables = [_table(side, root.at(side, "moments")) for side in ("baseline", "winner")]
    shown = [table for table in tables if table.rows]
    if not shown:
        return Section(
            title, (Paragraph(f"Not recorded: {show(note)}." if note else record.NOT_RECORDED, "muted"),)
        )
    intro = (
        "The same requests served together, sharing nothing: what the planner predicts from their lengths "
        "alone, and what the engine's storage holds. The whole process counts the model, Python and what its "
        "allocator keeps, too; the winner was measured after the baseline, in the same process."
    )  # fmt: skip
    blocks: list[Block] = [Paragraph(intro), *shown]
    return Section(title, tuple(blocks))


def _table(side: str, moments: Place) -> Table:
    rows = tuple(_row(place, side) for place in moments.elements())
    return Table(f"{side.capitalize()}: bytes of KV cache", HEADERS, rows)


def _row(place: Place, side: str) -> tuple[Cell, ...]:
    name = show(place.at("name").value)
    prefix = f"memory.{side}.{name.replace(' ', '-')}"
    sizes = ("predicted_allocated_bytes", "allocated_bytes", "predicted_used_bytes", "used_bytes")
    return (
        Cell(name, pointer=place.at("name").pointer),
        placed(place.at("num_requests"), test_id=f"{prefix}.requests"),
        placed(place.at("num_tokens"), test_id=f"{prefix}.tokens"),
        *(placed(place.at(size), "bytes", test_id=f"{prefix}.{size}") for size in sizes),
        _agreement(place.value),
        placed(place.at("process_bytes"), "bytes", test_id=f"{prefix}.process"),
    )


def _agreement(moment: Any) -> Cell:
    """Whether both predictions hold, and by how much they are off."""
    fields = as_mapping(moment)
    worst = 0.0
    for kind in ("allocated", "used"):
        found, foreseen = (number(fields.get(key)) for key in (f"{kind}_bytes", f"predicted_{kind}_bytes"))
        if found is None or foreseen is None:
            return Cell(record.NOT_RECORDED, tone="muted")
        worst = max(worst, abs(found - foreseen) / max(found, foreseen, 1.0))
    return Cell("to the byte", tone="good") if worst == 0 else Cell(f"{100 * worst:.2g} % off", tone="warn")
