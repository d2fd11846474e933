"""The decision: what to run, what it buys in the number people act on, what it costs, how to start it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import (
    VERDICT_TONES,
    Block,
    Card,
    Cards,
    Cell,
    Code,
    Paragraph,
    Section,
    cell,
    placed_figure,
    verdict_cell,
)
from kvtune.report.record import (
    Place,
    as_mapping,
    figure,
    find,
    metric_label,
    number,
    show,
    show_layers,
    show_number,
)

__all__ = ["BYTES", "decision_section", "headline", "is_baseline_kept", "is_worse", "report_title"]

BYTES = "kv_bytes_per_token"
BOUNDS = "From and to: bounds that each hold with 95 % confidence; n: the number of observations behind them."
_HIGHER_IS_BETTER = (
    "goodput",
    "per_s",
    "requests_held",
    "capacity",
    "cached",
    "slo_met",
    "num_blocks",
    "hit",
)


def report_title(result: Mapping[str, Any]) -> str:
    """The model's name and the verdict."""
    paths = ("identity.model.repo", "identity.model.name", "identity.model.path", "model.path", "model")
    name = next((v for v in (find(result, path) for path in paths) if isinstance(v, str)), "")
    tail = "/".join((name or record.NOT_RECORDED).rstrip("/").rsplit("/", 2)[-2:])  # a last folder "model"
    return f"{tail}: {show(find(result, 'quality.verdict'))}"


def headline(result: Mapping[str, Any]) -> str:
    """The decision in a line."""
    if is_baseline_kept(result):
        return "Keep the baseline: nothing that was tried is proven to be better"
    before, after = (figure(find(result, f"held.{side}")).value for side in ("baseline", "winner"))
    if find(result, "winner.config") is None:
        return "No decision is recorded"
    if before is None or after is None:
        return f"Use {record.short_config(find(result, 'winner.config'))}"
    budget = show_number(number(find(result, "held.kv_budget_bytes")) or 0, "bytes")
    return f"Hold {show(round(after))} requests instead of {show(round(before))} in {budget} of KV cache"


def is_baseline_kept(result: Mapping[str, Any]) -> bool:
    kept = find(result, "winner.is_baseline")
    if isinstance(kept, bool):
        return kept
    winner = find(result, "winner.config")
    return winner is not None and winner == find(result, "baseline.config")


def decision_section(result: Mapping[str, Any]) -> Section:
    """Sentence, numbers, what got worse, and the command."""
    verdict = find(result, "quality.verdict")
    blocks: list[Block] = [
        Paragraph(_sentence(result), VERDICT_TONES.get(str(verdict), "warn")),
        _cards(Place(result)),
        Paragraph(BOUNDS, "muted"),
        *_speed(result),
        *_worse(result),
        *_run(result),
    ]
    return Section("Decision", tuple(blocks))


def _sentence(result: Mapping[str, Any]) -> str:
    reason = show(find(result, "quality.reason"))
    if is_baseline_kept(result):
        why = f" {show(find(result, 'stop_reason')).capitalize()}." if find(result, "stop_reason") else ""
        return "No configuration that passed the gate was significantly better than the baseline." + why
    if find(result, "winner.config") is None:
        return "No winner is recorded."
    changed = ", ".join(_changes(result)) or "nothing"
    return (
        f"Change {changed}; everything else stays as it is. The quality gate says "
        f"{show(find(result, 'quality.verdict'))}: {reason}."
    )


def _changes(result: Mapping[str, Any]) -> list[str]:
    """`k_codec from bf16 to int8`, for each setting in which the winner differs; a table of layers last."""
    before, after = (dict(as_mapping(find(result, f"{side}.config"))) for side in ("baseline", "winner"))
    layers = show_layers(after.pop("layer_codecs", {}))
    return [
        *(
            f"{name} from {show(before.get(name))} to {show(value)}"
            for name, value in after.items()
            if value != before.get(name)
        ),
        *([f"{layers} instead"] if layers else []),
    ]


def _cards(root: Place) -> Cards:
    held = root.at("held")
    budget = show(number(held.at("kv_budget_bytes").value), "bytes")
    ratio = root.at("gain", BYTES, "ratio")
    bytes_notes = (
        _note("baseline", placed_figure(root.at("baseline", "metrics", BYTES), "bytes",
                                        test_id="baseline-bytes-per-token")),
        Cell(_saved_text(number(ratio.value)), ratio.value, "bytes-saved", pointer=ratio.pointer),
    )  # fmt: skip
    tpot = root.at("gain", "tpot_s.mean")
    return Cards(
        (
            Card(
                f"Requests held in {budget} at once",
                _whole(held.at("winner", "value"), "held-winner"),
                (
                    _bounds_only(_held_bounds(held.at("winner"), "held-winner-bounds")),
                    _note("baseline", _held_bounds(held.at("baseline"), "held-baseline")),
                ),
            ),
            _slo_card(root),
            Card(
                "KV bytes per token",
                placed_figure(root.at("winner", "metrics", BYTES), "bytes", test_id="winner-bytes-per-token"),
                bytes_notes,
            ),
            Card(
                "Answers: the quality gate",
                verdict_cell(root.at("quality", "verdict").value, "verdict"),
                (_margin(root),),
            ),
            Card(
                "Speed against the baseline",
                verdict_cell(root.at("speed_verdict").value, "speed-verdict"),
                (_note("TPOT", placed_figure(tpot, "ratio", test_id="tpot-ratio")),) if tpot.value else (),
            ),
        )
    )


def _margin(root: Place) -> Cell:
    name = root.at("quality", "margin", "name")
    return Cell(f"margin {show(name.value)}", name.value, "margin-name", pointer=name.pointer)


def _note(word: str, shown: Cell) -> Cell:
    return Cell(f"{word} {shown.text}", shown.raw, shown.test_id, shown.tone, shown.pointer)


def _whole(place: Place, test_id: str) -> Cell:
    """A count of whole things: half a request is not held."""
    value = number(place.value)
    shown = show(None if value is None else int(value))
    return Cell(shown, place.value, test_id, "" if value is not None else "muted", place.pointer)


def _held_bounds(place: Place, test_id: str) -> Cell:
    """`834 (783 to 892, n = 732)`, in whole requests."""
    fields = {name: number(as_mapping(place.value).get(name)) for name in ("value", "low", "high", "n")}
    if fields["value"] is None:
        return _whole(place, test_id)
    whole = {name: None if v is None else int(v) for name, v in fields.items()}
    shown = placed_figure(Place(whole, place.pointer), test_id=test_id)
    return Cell(shown.text, fields["value"], test_id, pointer=place.pointer)


def _bounds_only(shown: Cell) -> Cell:
    """The parenthesis of a figure whose value stands above it."""
    _, opening, bounds = shown.text.partition(" (")
    return replace(shown, text=bounds.rstrip(")") if opening else shown.text)


def _slo_card(root: Place) -> Card:
    """How many of the load's requests met the latency target; without one, the search's own limit."""
    target = root.at("within_slo", "slo")
    seconds = {label: number(target.at(key).value) for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))}
    limits = " and ".join(
        f"{label} {show_number(limit, 's')}" for label, limit in seconds.items() if limit is not None
    )
    asked = target.at("is_asked").value
    label = "Served within the SLO" if asked else "Served within the baseline's own latency"
    why = (
        limits if asked else f"{limits}: {_trimmed(show(target.at('factor').value))} times the baseline's p95"
    )
    winner, baseline = (root.at("within_slo", side) for side in ("winner", "baseline"))
    limit_cell = Cell(why if limits else record.NOT_RECORDED, pointer=target.pointer, test_id="slo-limits")
    notes = (
        _bounds_only(_met_cell(winner, "winner")),
        _note("baseline", _met_cell(baseline, "baseline")),
        limit_cell,
    )
    main = _met_cell(winner, "winner")
    return Card(label, replace(main, text=main.text.partition(" (")[0], test_id="slo-met"), notes)


def _met_cell(place: Place, side: str) -> Cell:
    """`25.5 of 32 (19.6 to 29.2)`."""
    shown = figure(place.value)
    if shown.value is None:
        return cell(None, test_id=f"slo-{side}")
    bounds = [_trimmed(show_number(edge)) for edge in (shown.low, shown.high) if edge is not None]
    text = f"{_trimmed(show_number(shown.value))} of {show(shown.n)}"
    text += f" ({' to '.join(bounds)})" if len(bounds) == 2 else ""
    return Cell(text, place.at("value").value, f"slo-{side}", pointer=place.pointer)


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _saved_text(ratio: float | None) -> str:
    if ratio is None:
        return record.NOT_RECORDED
    saved = 1 - ratio
    return f"{abs(saved) * 100:.1f} % {'fewer' if saved >= 0 else 'more'}"


def _speed(result: Mapping[str, Any]) -> list[Block]:
    """Speed that was not decided, said as plainly as quality that was not."""
    if find(result, "speed_verdict") != "UNDECIDED":
        return []
    text = "Speed is UNDECIDED: the ratios lie within the limit, their upper bounds do not. Repeat it on a "
    return [Paragraph(text + "quieter machine or with a larger budget.", "warn")]


def is_worse(metric: str, ratio: float) -> bool | None:
    """Whether winner / baseline is for the worse; None where they are equal."""
    if ratio == 1:
        return None
    higher_is_better = any(part in metric for part in _HIGHER_IS_BETTER) and BYTES not in metric
    return (ratio > 1) != higher_is_better


def _worse(result: Mapping[str, Any]) -> list[Block]:
    """What the winner does significantly worse, kept in sight."""
    if not find(result, "gain"):
        return []
    lines: list[str] = []
    for metric, entry in as_mapping(find(result, "gain")).items():
        ratio = figure(entry).value
        if as_mapping(entry).get("significant") is True and ratio is not None and is_worse(metric, ratio):
            interval = record.show_interval(figure(entry))
            lines.append(f"{metric_label(metric)} is {show_number(ratio)}x the baseline's ({interval})")
    if not lines:
        return [Paragraph("What got worse: nothing that was measured, beyond the noise shown below.")]
    return [Paragraph("What got worse: " + "; ".join(lines) + ".", "warn")]


def _run(result: Mapping[str, Any]) -> list[Block]:
    """What starts it, ready to be pasted."""
    text, refusal = find(result, "emitted.text"), find(result, "emitted.refusal")
    blocks: list[Block] = []
    if isinstance(text, str):
        blocks += [Paragraph("Run it:"), Code(text.rstrip(), "emitted")]
    elif refusal:
        blocks.append(Paragraph(f"Not emitted: {show(refusal)}", "warn"))
    if find(result, "next_command"):
        blocks += [Paragraph("The next command:"), Code(show(find(result, "next_command")), "next-command")]
    return blocks
