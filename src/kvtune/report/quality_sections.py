"""Quality: each metric against its margin, by kind of request, against position, and what is not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report import record
from kvtune.report.answers import answer_blocks, limit_blocks
from kvtune.report.blocks import (
    VERDICT_TONES,
    Block,
    Cell,
    Facts,
    Figures,
    Interval,
    Intervals,
    Lines,
    Paragraph,
    Section,
    Series,
    Table,
    cell,
    figure_cell,
    placed,
    placed_figure,
    verdict_cell,
)
from kvtune.report.record import Place, as_mapping, figure, find, metric_label, number, show, unit_of

__all__ = ["failing_section", "position_section", "quality_section"]

NEAR = 3.0
"""A margin further above the curve than this would only press it flat; a sentence names it."""


def quality_section(result: Mapping[str, Any]) -> Section:
    """The verdict and what it rests on."""
    quality = Place(result).at("quality")
    facts = Facts(
        (
            ("Verdict", verdict_cell(quality.at("verdict").value, "quality-verdict")),
            ("Why", placed(quality.at("reason"))),
            ("Proven on real text", placed(quality.at("proven"), test_id="proven")),
            ("Requests replayed", placed(quality.at("num_requests"), test_id="quality.num_requests")),
            ("Sessions, drawn whole", placed(quality.at("num_clusters"), test_id="quality.num_clusters")),
            ("Tokens scored", placed(quality.at("num_tokens"), test_id="quality.num_tokens")),
            ("Requests decoded token by token", placed(quality.at("num_decode_requests"))),
            ("KL over", cell(_kl_method(as_mapping(quality.value)))),
        )
    )
    rows = tuple(_metric_row(name, place) for name, place in quality.at("metrics").items())
    caption = "Excess over the A/A floor; passed when the upper bound is at most the margin"
    table = Table(caption, ("Metric", "Excess", "A/A floor", "Margin", "Verdict"), rows)
    drawn = tuple(r for r in (_margin_interval(n, p) for n, p in quality.at("metrics").items()) if r)
    chart = Intervals("Damage against the margin", "share of the margin used", drawn, 1.0, "margin")
    bare = as_mapping(quality.value).get("bit_equal") is True
    missing = Paragraph("Every bit equals the baseline's." if bare else "Metrics: not recorded", "muted")
    return Section(
        "Quality",
        (
            facts,
            *((chart, table) if rows else (missing,)),
            *answer_blocks(quality),
            *limit_blocks(quality),
        ),
    )


def _kl_method(quality: Mapping[str, Any]) -> str | None:
    if quality.get("kl_exact") is True:
        return "the whole vocabulary (exact)"
    ids = quality.get("kl_ids")
    return None if ids is None else f"the {show(ids)} most likely ids and the lumped rest (a lower bound)"


def _metric_row(name: str, place: Place) -> tuple[Cell, ...]:
    return (
        Cell(metric_label(name)),
        placed_figure(place.at("excess"), test_id=f"quality.{name}"),
        placed(place.at("floor")),
        placed(place.at("margin"), test_id=f"margin.{name}"),
        verdict_cell(place.at("verdict").value),
    )


def _margin_interval(name: str, place: Place) -> Interval | None:
    shown, margin = figure(place.at("excess").value), number(place.at("margin").value)
    if not margin or shown.value is None or shown.high is None:
        return None
    low = shown.value if shown.low is None else shown.low
    tone = VERDICT_TONES.get(str(place.at("verdict").value), "")
    label = metric_label(name)
    note = f"{label}: {figure_cell(shown).text}, margin {show(margin)}"
    return Interval(label, low / margin, shown.value / margin, shown.high / margin, tone, note)


# ---------------------------------------------------------------- position


def position_section(result: Mapping[str, Any]) -> Section:
    """Mean KL of tokens by where they stand."""
    positions = Place(result).at("positions")
    title = "KL against position"
    if not positions.value:
        text = "Not recorded: every bit is equal, or the baseline stays."
        return Section(title, (Paragraph(text, "muted"),))
    margin = number(find(result, "quality.metrics.kl.margin"))
    kinds = (
        ("context", "By position in the context", "Tokens before it", "tokens before the scored one"),
        ("answer", "By position in the answer", "Tokens of the answer before it", "tokens of the answer"),
    )
    blocks: list[Block] = [
        Paragraph(
            "Damage that grows with distance hides in a mean over all tokens; here it would rise to the "
            "right. Raw means, the floor of the same tokens beside them."
        )
    ]
    if margin is not None:
        blocks.append(Paragraph(f"The margin of the mean is {show(margin)}; drawn where it is near."))
    blocks += [_position_figure(positions.at(key), name, axis, margin) for key, name, _, axis in kinds]
    blocks += [
        _position_table(positions.at(key), f"{name}: mean KL", header, key) for key, name, header, _ in kinds
    ]
    return Section(title, tuple(blocks))


def _position_figure(bins: Place, title: str, axis: str, margin: float | None) -> Figures:
    rows = [(as_mapping(p.value), figure(p.at("kl").value)) for p in bins.elements()]
    xs = [(number(fields.get("to")) or 0) + 1 for fields, _ in rows]
    mean = tuple((x, shown.value) for x, (_, shown) in zip(xs, rows, strict=True))
    upper = tuple((x, shown.high) for x, (_, shown) in zip(xs, rows, strict=True))
    floor = tuple((x, number(fields.get("floor"))) for x, (fields, _) in zip(xs, rows, strict=True))
    series = [
        Series("winner, mean", mean, look=0, has_dots=True),
        Series("upper 95 % bound", upper, look=4),
        Series("A/A floor", floor, look=5),
    ]
    top = max((y for _, y in upper if y is not None), default=0.0)
    if margin is not None and xs and margin <= NEAR * top:
        series.append(Series("margin", ((min(xs), margin), (max(xs), margin)), look=1))
    values = [y for _, y in mean if y is not None]
    summary = f"mean KL between {show(min(values))} and {show(max(values))} nats" if values else ""
    return Lines(title, f"{axis}, up to", "mean KL (nats)", tuple(series), summary, is_log_x=True)


def _position_table(bins: Place, caption: str, header: str, key: str) -> Table:
    rows = tuple(
        (
            Cell(_span(p), pointer=p.pointer),
            placed(p.at("num_tokens")),
            placed_figure(p.at("kl"), test_id=f"position.{key}.{index}"),
            placed(p.at("floor")),
        )
        for index, p in enumerate(bins.elements())
    )
    return Table(caption, (header, "Tokens scored", "Mean KL", "A/A floor"), rows)


def _span(place: Place) -> str:
    first, last = (show(place.at(key).value) for key in ("from", "to"))
    return first if first == last else f"{first} to {last}"


# ---------------------------------------------------------------- the step below


def failing_section(result: Mapping[str, Any]) -> Section:
    """The largest configuration below the winner that the gate did not pass: where harm begins."""
    title = "Smallest step that fails"
    step = Place(result).at("smallest_failing_step")
    if step.value is None:
        text = "Not recorded: no tried configuration below the winner failed the gate, or none was tried."
        return Section(title, (Paragraph(text, "muted"),))
    config = step.at("config")
    kl = step.at("quality", "metrics", "kl", "excess")
    named = Cell(record.long_config(config.value), test_id="failing-config", pointer=config.pointer)
    size = step.at("metrics", "kv_bytes_per_token")
    facts = (
        ("Configuration", named),
        ("KV bytes per token", placed(size, unit_of("kv_bytes_per_token"), test_id="failing-bytes")),
        ("Mean KL, excess", placed_figure(kl, test_id="failing-kl")),
        ("Verdict", verdict_cell(step.at("quality", "verdict").value, "failing-verdict")),
        ("Why", placed(step.at("quality", "reason"))),
    )
    return Section(title, (Facts(facts),))
