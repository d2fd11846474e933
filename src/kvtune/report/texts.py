"""Answers by kind of request: what was seen of each, and both sides' texts, the most damaged first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import (
    Block,
    Cell,
    Paragraph,
    Section,
    SideBySide,
    Table,
    cell,
    placed,
)
from kvtune.report.diff import marked
from kvtune.report.record import Place, as_mapping, as_sequence, find, number, show

__all__ = ["cases_section", "texts_section"]

CASES = ("easy", "average", "long_context", "malformed")
STRATUM_NAMES = {
    "case": "case", "language": "language", "prompt_tokens": "prompt tokens", "task": "task",
}  # fmt: skip


def cases_section(result: Mapping[str, Any]) -> Section:
    """Easy, average, long, malformed and high-value requests, then every other stratum."""
    counts = Place(result).at("workload", "cases")
    replayed = _by_value(Place(result).at("quality", "strata"), "case")
    known = [name for name in as_mapping(counts.value) if name not in CASES]
    rows = [_case_row(name, counts.at(name), replayed.get(name)) for name in (*CASES, *known)]
    rows.append(_high_value_row(Place(result).at("quality", "answers")))
    headers = ("Case", "Requests", "Rejected", "Replayed", "Mean KL", "Top-1 flips", "Delta NLL")
    blocks: list[Block] = [Table("Raw means, before the floor is taken off", headers, tuple(rows))]
    blocks += _strata(Place(result).at("quality", "strata"))
    blocks += _rejected(result)
    return Section("Quality by kind of request", tuple(blocks))


def _by_value(strata: Place, name: str) -> dict[str, Place]:
    return {
        show(place.at("value").value): place
        for place in strata.elements()
        if place.at("stratum").value == name
    }


def _case_row(name: str, counts: Place, replayed: Place | None) -> tuple[Cell, ...]:
    title = Cell(name.replace("_", " "))
    asked = placed(counts.at("num_requests"), test_id=f"case.{name}.requests")
    if counts.value is None:
        asked = Cell("none in this workload", tone="muted")
    turned = Cell("-") if counts.value is None else placed(counts.at("num_rejected"))
    if replayed is None:
        return (title, asked, turned, *(Cell("none", tone="muted") for _ in range(4)))
    seen = ("num_requests", "kl", "flips", "delta_nll")
    return (title, asked, turned, *(placed(replayed.at(key), test_id=f"case.{name}.{key}") for key in seen))


def _high_value_row(answers: Place) -> tuple[Cell, ...]:
    title = Cell("high-value")
    if as_mapping(answers.value).get("high_value") is not True:
        why = Cell("none given (--high-value FILE)", tone="muted")
        return (title, why, *(Cell("-") for _ in range(5)))
    rows = [as_mapping(row) for row in as_sequence(answers.at("requests").value)]
    harmed = sum(row.get("status") == "harmed" for row in rows)
    tone = "bad" if harmed else "good"
    return (
        title, placed(answers.at("num_requests"), test_id="case.high_value.requests"), Cell("-"),
        Cell("each judged alone"), Cell("harmed" if harmed else "none harmed", tone=tone), Cell("-"),
        Cell("-"),
    )  # fmt: skip


def _strata(strata: Place) -> list[Block]:
    rows = tuple(
        (
            Cell(f"{STRATUM_NAMES.get(name, name)}: {show(place.at('value').value)}", pointer=place.pointer),
            *(placed(place.at(key)) for key in ("num_requests", "kl", "flips", "delta_nll")),
        )
        for place in sorted(strata.elements(), key=_stratum_order)
        if (name := show(place.at("stratum").value)) != "case"
    )
    if not rows:
        return [] if strata.value else [Paragraph(f"By stratum: {record.NOT_RECORDED}", "muted")]
    headers = ("Stratum", "Replayed", "Mean KL", "Top-1 flips", "Delta NLL")
    return [Table("By stratum of the traffic: raw means", headers, rows)]


def _stratum_order(place: Place) -> tuple[str, int, str]:
    """By name, then by the number that a range of lengths begins with."""
    value = show(place.at("value").value)
    digits = re.match(r"\d+", value)
    return show(place.at("stratum").value), int(digits[0]) if digits else 0, value


def _rejected(result: Mapping[str, Any]) -> list[Block]:
    """Malformed requests are refused by name, never served and never counted."""
    entries = Place(result).at("workload", "rejected").elements()
    if not entries:
        return []
    rows = tuple(
        (Cell(show(p.at("request_id").value), pointer=p.at("request_id").pointer), placed(p.at("reason")))
        for p in entries
    )
    caption = f"Rejected before any engine saw them: {show(find(result, 'workload.num_rejected'))}"
    return [Table(caption, ("Request", "Why"), rows)]


# ---------------------------------------------------------------- texts


def texts_section(result: Mapping[str, Any]) -> Section:
    """Pairs of answers with their differences marked."""
    title = "Answers side by side"
    root = Place(result).at("answers_side_by_side")
    samples = root.at("samples").elements()
    if not samples:
        text = "Not recorded: the baseline stays, or every bit of the answers is equal."
        return Section(title, (Paragraph(text, "muted"),))
    blocks: list[Block] = [
        Paragraph(
            f"Greedy answers of {show(root.at('num_requests').value)} requests; "
            f"{show(root.at('num_changed').value)} of them differ somewhere. One changed token sends the "
            "rest of an answer another way, so a different text is not a worse one; the numbers above are "
            "measured on the baseline's own tokens. The most damaged first, then the worst of each case. "
            "Answers run on past their end mark: what follows is scored, too. This page holds texts of your "
            "requests: share it accordingly, or redraw it with "
            "kvtune report --redact."
        ),
        *_json_validity(root.at("json")),
    ]
    blocks += [_pair(place, index) for index, place in enumerate(samples)]
    return Section(title, tuple(blocks))


def _json_validity(place: Place) -> list[Block]:
    valid, kept = (number(place.at(key).value) for key in ("baseline_valid", "still_valid"))
    if valid is None or kept is None:
        return []
    if not valid:
        return [Paragraph("Structured output: no answer of the baseline is JSON.", "muted")]
    text = (
        f"Structured output: {show(valid)} answers of the baseline are JSON, {show(kept)} of them still are."
    )
    return [Paragraph(text, "" if kept == valid else "warn")]


def _pair(place: Place, index: int) -> SideBySide:
    fields = as_mapping(place.value)
    before, after = (show(fields.get(side)) for side in ("baseline", "winner"))
    left, right = marked(before, after)
    strata = ", ".join(f"{name} {show(value)}" for name, value in as_mapping(fields.get("strata")).items())
    change = place.at("first_change")
    changed = Cell("nowhere: equal", tone="good") if change.value is None else placed(change)
    return SideBySide(
        placed(place.at("request_id"), test_id=f"sample.{index}"),
        (
            ("mean KL", placed(place.at("kl"), test_id=f"sample.{index}.kl")),
            ("top-1 flips", placed(place.at("flips"))),
            ("prompt tokens", placed(place.at("prompt_tokens"))),
            ("first changed token", changed),
            ("kind", replace(cell(strata or None), pointer=place.at("strata").pointer)),
        ),
        "Baseline", "Winner", left, right, "End of the prompt", show(fields.get("prompt_end")),
    )  # fmt: skip
