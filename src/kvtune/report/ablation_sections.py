"""What each setting of the winner contributes, and which settings moved the search's results."""

from __future__ import annotations

from collections.abc import Mapping
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
    placed,
    placed_figure,
    verdict_cell,
)
from kvtune.report.record import Place, as_mapping, as_sequence, figure, find, show, show_number

__all__ = ["ablation_section"]

HEADERS = ("Winner without", "Setting back at", "KV bytes/token", "Mean KL", "Gate", "TPOT, x baseline",
           "TTFT p95, x baseline", "Measured")  # fmt: skip


def ablation_section(result: Mapping[str, Any]) -> Section:
    """The winner with one setting at a time back at the baseline's value."""
    title = "The winner one setting at a time"
    root = Place(result).at("ablation")
    if not root.value:
        why = (
            "the baseline stays, so there is nothing to take apart"
            if _is_kept(result)
            else record.NOT_RECORDED
        )
        return Section(title, (Paragraph(why[0].upper() + why[1:] + ".", "muted"), *_importance(result)))
    variants = root.at("variants").elements()
    rows = [_whole(root.at("winner"))] if root.at("winner").value else []
    rows += [_variant(place) for place in variants]
    blocks: list[Block] = [
        Paragraph("Each row is the winner with one setting put back to the baseline's value: what is lost "
                  "again is what that setting contributes. " + _sentence(find(result, "ablation.note"))),
        Table("Ablation", HEADERS, tuple(rows)),
        _chart(root),
    ]  # fmt: skip
    skipped = [str(name) for name in as_sequence(root.at("skipped").value)]
    if skipped:
        blocks.append(Paragraph(f"No time was left to measure: {', '.join(skipped)}.", "warn"))
    return Section(title, (*blocks, *_importance(result)))


def _sentence(note: Any) -> str:
    text = show(note)
    return f"{text[:1].upper()}{text[1:]}."


def _is_kept(result: Mapping[str, Any]) -> bool:
    return find(result, "winner.is_baseline") is True


def _whole(place: Place) -> tuple[Cell, ...]:
    return (Cell("nothing (the winner)"), Cell("-"), *_measured(place, "ablation.winner"))


def _variant(place: Place) -> tuple[Cell, ...]:
    name = show(place.at("setting").value)
    was, is_ = (place.at(side) for side in ("baseline_value", "value"))
    text = f"{_short(was.value)} (winner: {_short(is_.value)})"
    return (
        Cell(name, pointer=place.at("setting").pointer),
        Cell(text, pointer=place.pointer),
        *_measured(place, f"ablation.{name}"),
    )


def _short(value: Any) -> str:
    text = show(value)
    return text if len(text) <= 40 else f"a table of {len(as_mapping(value))}"


def _measured(place: Place, test_id: str) -> tuple[Cell, ...]:
    kl, quality = place.at("quality", "metrics", "kl", "excess"), place.at("quality")
    equal = as_mapping(quality.value).get("bit_equal") is True
    shown = Cell("0, every bit equal") if equal else placed_figure(kl, test_id=f"{test_id}.kl")
    if quality.value is None and "baseline" in show(place.at("reason").value):
        shown = Cell("0, the baseline")
    return (
        placed(place.at("metrics", "kv_bytes_per_token"), "bytes", test_id=f"{test_id}.bytes"),
        shown,
        verdict_cell(place.at("quality", "verdict").value or place.at("status").value),
        placed_figure(place.at("ratios", "tpot_s.mean"), "ratio", test_id=f"{test_id}.tpot"),
        placed_figure(place.at("ratios", "ttft_s.p95"), "ratio", test_id=f"{test_id}.ttft"),
        placed(place.at("source")),
    )


def _chart(root: Place) -> Intervals:
    rows: list[Interval] = []
    for label, place in (
        ("winner", root.at("winner")),
        *((f"without {show(p.at('setting').value)}", p) for p in root.at("variants").elements()),
    ):
        shown = figure(place.at("ratios", "tpot_s.mean").value)
        if shown.value is not None:
            low = shown.value if shown.low is None else shown.low
            high = shown.value if shown.high is None else shown.high
            note = f"{label}: {show_number(shown.value)}x ({record.show_interval(shown)})"
            rows.append(Interval(label, low, shown.value, high, "", note))
    return Intervals("TPOT of each variant", "ratio to the baseline", tuple(rows), 1.0, "baseline")


def _importance(result: Mapping[str, Any]) -> tuple[Block, ...]:
    """Share of the spread over trials that a setting explains alone."""
    entries = Place(result).at("importance").elements()
    if not entries:
        return ()
    rows = tuple(
        (
            Cell(show(place.at("setting").value), pointer=place.at("setting").pointer),
            *(
                placed(
                    place.at(name), "share", test_id=f"importance.{show(place.at('setting').value)}.{name}"
                )
                for name in ("bytes", "kl", "tpot")
            ),
            placed(place.at("num_values")),
        )
        for place in entries
    )
    caption = (
        "Over all trials of the search: share of the spread of each result that the setting's values explain "
        "alone (eta squared; trials are not a balanced design)"
    )
    headers = ("Setting", "of KV bytes", "of log KL", "of TPOT", "Values tried")
    return (Table(caption, headers, rows),)
