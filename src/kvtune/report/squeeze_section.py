"""What may be given up while memory is short: the low planes that may go, and the proof that they may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report.blocks import (
    Cell,
    Facts,
    Paragraph,
    Section,
    Table,
    placed,
    placed_figure,
    verdict_cell,
)
from kvtune.report.record import Place, as_mapping, as_sequence, number, show, unit_of

__all__ = ["squeeze_section"]

SIDES = {"k": "keys", "v": "values"}


def squeeze_section(result: Mapping[str, Any]) -> Section | None:
    """None where nobody asked."""
    root = Place(result).at("squeeze")
    if root.value is None:
        return None
    quality = root.at("quality")
    if quality.value is None:
        blocks = (Paragraph(_nothing(root), "warn"), *_sides(root), *_tried(root))
        return Section("When memory gets short", blocks)
    size = unit_of("kv_bytes_per_token")
    facts = Facts((
        ("Sides whose low plane may go", placed(root.at("num_proven"), test_id="squeeze-sides")),
        ("KV bytes per token, all there", placed(root.at("bytes_per_token"), size)),
        ("KV bytes per token, these planes gone",
         placed(root.at("lowered_bytes_per_token"), size, test_id="squeeze-bytes")),
        ("Verdict on reading so", verdict_cell(quality.at("verdict").value, "squeeze-verdict")),
        ("Why", placed(quality.at("reason"))),
        ("Mean KL, excess", placed_figure(quality.at("metrics", "kl", "excess"), test_id="squeeze-kl")),
        ("Requests replayed", placed(quality.at("num_requests"))),
    ))  # fmt: skip
    return Section("When memory gets short", (Paragraph(_gained(root)), facts, *_sides(root), *_tried(root)))


def _nothing(root: Place) -> str:
    tried = root.at("tried").elements()
    why = show(root.at("skipped").value)
    if tried:
        last = tried[-1]
        why = f"{show(last.at('verdict').value)}: {show(last.at('reason').value)}"
    return f"No low plane may go: {why}. Under memory pressure requests are preempted."


def _gained(root: Place) -> str:
    whole, lowered = (number(root.at(n).value) for n in ("bytes_per_token", "lowered_bytes_per_token"))
    held = (
        "" if not whole or not lowered else f" Half of the KV budget then holds {whole / lowered / 2:.0%} of"
    )
    return (
        "The recipe names low planes that the engine may drop before it preempts; they were all gone at once "
        "while the gate judged requests the search never saw, and come back bit for bit."
        + (f"{held} what the whole one did." if held else "")
    )


def _sides(root: Place) -> tuple[Table, ...]:
    proven = as_mapping(root.at("planes").value)
    rows: list[tuple[Cell, ...]] = []
    for side in root.at("sides").elements():
        layer, name = show(side.at("layer").value), str(side.at("side").value)
        planes = dict(zip(SIDES, as_sequence(proven.get(layer)), strict=False))
        may_go = planes.get(name) == 1
        kl = placed(side.at("kl"))
        rows.append((Cell(layer), Cell(SIDES.get(name, name)), kl, Cell("may go" if may_go else "stays")))
    headers = ("Layer", "Side", "KL added alone, nats/token", "Low plane")
    return (Table("Every side stored in two planes, mildest first", headers, tuple(rows)),) if rows else ()


def _tried(root: Place) -> tuple[Table, ...]:
    """Every set that the gate judged, where it was more than one: they share one chance of a false PASS."""
    tried = root.at("tried").elements()
    if len(tried) < 2:
        return ()
    rows = tuple(
        (
            Cell(_named(as_mapping(one.at("planes").value))),
            verdict_cell(one.at("verdict").value),
            placed(one.at("reason")),
        )
        for one in tried
    )
    return (
        Table("Sets judged, which share one chance of a false PASS", ("Planes gone", "Verdict", "Why"), rows),
    )


def _named(planes: Mapping[str, Any]) -> str:
    """`layer 2 values, 3 keys and values`."""
    texts: list[str] = []
    for layer, pair in planes.items():
        counts = zip(as_sequence(pair), SIDES.values(), strict=False)
        texts.append(f"{layer} " + " and ".join(name for count, name in counts if count == 1))
    return "layer " + ", ".join(texts) if texts else "none"
