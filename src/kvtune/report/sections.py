"""What a report says, in order: the decision first, then the evidence, then how to repeat and what voids it.

Reads the record that `tune` writes as result.json; every path it looks at is listed where it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvtune.report import record
from kvtune.report.answers import answer_blocks, limit_blocks
from kvtune.report.blocks import (
    VERDICT_TONES,
    Block,
    Bullets,
    Cell,
    Code,
    Facts,
    Interval,
    Intervals,
    Paragraph,
    Section,
    Table,
    Tone,
    cell,
    figure_cell,
    verdict_cell,
)
from kvtune.report.record import (
    as_mapping,
    as_sequence,
    figure,
    find,
    metric_label,
    number,
    show,
    show_number,
    unit_of,
)
from kvtune.report.trials import trials_section

BYTES = "kv_bytes_per_token"
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
    model = find(
        result, "identity.model.name", "identity.model.repo", "identity.model.path", "model.path", "model"
    )
    name = model if isinstance(model, str) else record.NOT_RECORDED
    tail = "/".join(name.rstrip("/").rsplit("/", 2)[-2:])  # the last folder alone is often just "model"
    return f"{tail}: {show(find(result, 'quality.verdict'))}"


def sections(result: Mapping[str, Any]) -> tuple[Section, ...]:
    """All sections in reading order; the last one is the raw record."""
    return (
        _decision(result),
        _comparison(result),
        _quality(result),
        _failing_step(result),
        trials_section(result),
        _noise(result),
        _held(result),
        _workload(result),
        _limits(result),
        _repeat(result),
        _identity(result),
        Section(
            "Raw record",
            (Code(json.dumps(result, indent=1, ensure_ascii=False, default=str), "raw", "result.json"),),
        ),
    )


# ---------------------------------------------------------------- decision


def _decision(result: Mapping[str, Any]) -> Section:
    verdict = find(result, "quality.verdict")
    before, after = _metric(result, "baseline", BYTES), _metric(result, "winner", BYTES)
    saved = None if not before.value or after.value is None else 1 - after.value / before.value
    cards = (
        ("Verdict", verdict_cell(verdict, "verdict")),
        ("KV bytes per token, winner", cell(after.value, "bytes", test_id="winner-bytes-per-token")),
        ("KV bytes per token, baseline", cell(before.value, "bytes", test_id="baseline-bytes-per-token")),
        (
            "Of the baseline's KV bytes",
            Cell(_saved_text(saved), saved, "bytes-saved", "" if saved is not None else "muted"),
        ),
        ("Requests held in the same budget", _held_card(result)),
        ("Winner", Cell(record.short_config(find(result, "winner.config")), test_id="winner-short")),
    )
    blocks: list[Block] = [
        Paragraph(_sentence(result, saved), VERDICT_TONES.get(str(verdict), "warn")),
        Facts(cards, True),
    ]
    reason = find(result, "quality.reason")
    blocks.append(Paragraph(f"Why: {show(reason)}"))
    blocks += [Paragraph(str(note), "warn") for note in as_sequence(find(result, "quality.notes"))]
    blocks += _speed(result)
    blocks += _worse(result)
    configuration = Facts(
        (
            (
                "Winning configuration",
                cell(record.long_config(find(result, "winner.config")), test_id="winner-config"),
            ),
            (
                "Baseline",
                cell(record.long_config(find(result, "baseline.config")), test_id="baseline-config"),
            ),
            ("Recipe", cell(find(result, "recipe"), test_id="recipe")),
        )
    )
    return Section("Decision", (*blocks, configuration, *_next(result)))


def _next(result: Mapping[str, Any]) -> tuple[Block, ...]:
    command = find(result, "next_command", "next")
    lines = command if isinstance(command, str) else "\n".join(str(line) for line in as_sequence(command))
    return (Paragraph("Next command:"), Code(lines or record.NOT_RECORDED, "next-command"))


def _sentence(result: Mapping[str, Any], saved: float | None) -> str:
    if _is_baseline_kept(result):
        return "Keep the baseline: no configuration that passed the gate was significantly better."
    name = record.short_config(find(result, "winner.config"))
    if find(result, "winner.config") is None:
        return "No winner is recorded."
    effect = "" if saved is None else f": {_saved_text(saved)} KV bytes than the baseline"
    return f"Use {name}{effect}. The quality gate says {show(find(result, 'quality.verdict'))}."


def _is_baseline_kept(result: Mapping[str, Any]) -> bool:
    kept = find(result, "winner.is_baseline", "winner.baseline")
    if isinstance(kept, bool):
        return kept
    winner = find(result, "winner.config")
    return winner is not None and winner == find(result, "baseline.config")


def _saved_text(saved: float | None) -> str:
    if saved is None:
        return record.NOT_RECORDED
    return f"{abs(saved) * 100:.1f} % {'fewer' if saved >= 0 else 'more'}"


def _held_card(result: Mapping[str, Any]) -> Cell:
    before, after = (
        figure(find(result, f"held.{side}", f"held.{side}.requests", f"{side}.held"))
        for side in ("baseline", "winner")
    )
    if before.value is None and after.value is None:
        return cell(None, test_id="held-winner")
    held, instead = (show(None if side.value is None else int(side.value)) for side in (after, before))
    return Cell(f"{held} (baseline {instead})", after.value, "held-winner")


def _speed(result: Mapping[str, Any]) -> list[Block]:
    """Speed that was not decided, said as plainly as quality that was not."""
    if find(result, "speed_verdict") != "UNDECIDED":
        return []
    text = "Speed is UNDECIDED: the ratios lie within the limit, their upper bounds do not. Repeat it on a "
    return [Paragraph(text + "quieter machine or with a larger budget.", "warn")]


def _worse(result: Mapping[str, Any]) -> list[Block]:
    """What the winner does significantly worse, kept in sight."""
    lines: list[str] = []
    for metric, entry in as_mapping(find(result, "gain")).items():
        ratio = figure(entry).value
        if (
            as_mapping(entry).get("significant") is True
            and ratio is not None
            and _tone_of(metric, ratio) == "bad"
        ):
            interval = record.show_interval(figure(entry))
            lines.append(f"{metric_label(metric)} is {show_number(ratio)}x the baseline's ({interval})")
    if not lines:
        return (
            [Paragraph("No recorded metric got significantly worse than the baseline's.")]
            if find(result, "gain")
            else []
        )
    return [Paragraph("What got worse: " + "; ".join(lines) + ".", "warn")]


# ---------------------------------------------------------------- baseline against winner


def _comparison(result: Mapping[str, Any]) -> Section:
    gains = as_mapping(find(result, "gain"))
    names = list(
        dict.fromkeys(
            [*gains, *_flat(find(result, "baseline.metrics")), *_flat(find(result, "winner.metrics"))]
        )
    )
    rows = tuple(_comparison_row(result, name, gains.get(name)) for name in names)
    table = Table(
        "Ratios are winner / baseline with 95 % intervals; \"noise\" means the interval holds 1.",
        ("Metric", "Baseline", "Winner", "Ratio", "Reading"), rows,
    )  # fmt: skip
    blocks: list[Block] = [table if rows else Paragraph(record.NOT_RECORDED, "warn")]
    figure_rows = tuple(row for row in (_gain_interval(name, entry) for name, entry in gains.items()) if row)
    blocks.append(
        Intervals("Winner against baseline", "ratio, winner / baseline", figure_rows, 1.0, "baseline")
    )
    return Section("Baseline against winner", tuple(blocks))


def _comparison_row(result: Mapping[str, Any], name: str, gain: Any) -> tuple[Cell, ...]:
    unit = unit_of(name.partition(".")[0])
    shown = figure(gain)
    reading, tone = _reading(name, gain)
    sides = [_metric(result, side, name) for side in ("baseline", "winner")]
    is_ratio_only = all(side.value is None for side in sides)
    cells = [
        Cell("-") if is_ratio_only else figure_cell(side, unit, test_id=f"{which}.{name}")
        for side, which in zip(sides, ("baseline", "winner"), strict=True)
    ]
    return (
        Cell(metric_label(name)),
        *cells,
        Cell("-") if gain is None else figure_cell(shown, test_id=f"gain.{name}"),
        Cell(reading, test_id=f"reading.{name}", tone=tone),
    )


def _reading(name: str, gain: Any) -> tuple[str, Tone]:
    ratio = figure(gain).value
    if ratio is None:
        return "", ""
    significant = as_mapping(gain).get("significant")
    if significant is None:
        return "interval " + record.NOT_RECORDED, "muted"
    if not significant:
        return "noise", "muted"
    tone = _tone_of(name, ratio)
    return ({"good": "better", "bad": "worse"}.get(tone, "equal"), tone)


def _tone_of(metric: str, ratio: float) -> Tone:
    if ratio == 1:
        return ""
    higher_is_better = any(part in metric for part in _HIGHER_IS_BETTER) and BYTES not in metric
    return "good" if (ratio > 1) == higher_is_better else "bad"


def _gain_interval(name: str, entry: Any) -> Interval | None:
    shown = figure(entry)
    if shown.value is None:
        return None
    low = shown.value if shown.low is None else shown.low
    high = shown.value if shown.high is None else shown.high
    reading, tone = _reading(name, entry)
    label = metric_label(name)
    return Interval(label, low, shown.value, high, tone, f"{label}: {figure_cell(shown).text} {reading}")


def _metric(result: Mapping[str, Any], side: str, name: str) -> record.Figure:
    """A metric of the baseline or the winner, dotted names leading into distributions."""
    return figure(find(result, f"{side}.metrics.{name}", f"{side}.{name}"))


def _flat(metrics: Any) -> list[str]:
    """Names of all numbers in a metrics mapping; distributions give one name per statistic."""
    names: list[str] = []
    for name, value in as_mapping(metrics).items():
        inner = as_mapping(value)
        if inner and {"p50", "p95", "p99"} & inner.keys():
            names += [f"{name}.{statistic}" for statistic in inner if statistic != "n"]
        elif figure(value).value is not None:
            names.append(name)
    return names


# ---------------------------------------------------------------- quality


def _quality(result: Mapping[str, Any]) -> Section:
    quality = as_mapping(find(result, "quality"))
    metrics = as_mapping(quality.get("metrics"))
    facts = Facts(
        (
            ("Verdict", verdict_cell(quality.get("verdict"), "quality-verdict")),
            ("Margin", cell(find(quality, "margin.name", "margin"), test_id="margin-name")),
            ("Proven on real text", cell(quality.get("proven"), test_id="proven")),
            ("Requests, sessions, tokens", _counts(quality)),
            ("KL over", cell(_kl_method(quality))),
        )
    )
    rows = tuple(_quality_row(name, as_mapping(entry)) for name, entry in metrics.items())
    table = Table(
        "Excess over the A/A floor with its 95 % bounds; passed when the upper bound is at most the margin.",
        ("Metric", "Excess", "A/A floor", "Margin", "Verdict"), rows,
    )  # fmt: skip
    intervals = tuple(row for row in (_margin_interval(n, as_mapping(e)) for n, e in metrics.items()) if row)
    chart = Intervals("Damage against the margin", "share of the margin used", intervals, 1.0, "margin")
    return Section(
        "Quality",
        (
            facts,
            *((table, chart) if rows else (Paragraph("Metrics: not recorded", "warn"),)),
            *_strata(quality),
            *_worst(quality),
            *answer_blocks(quality),
            *limit_blocks(quality),
        ),
    )


def _counts(quality: Mapping[str, Any]) -> Cell:
    return cell(", ".join(show(quality.get(name)) for name in ("num_requests", "num_clusters", "num_tokens")))


def _kl_method(quality: Mapping[str, Any]) -> str | None:
    if quality.get("kl_exact") is True:
        return "the whole vocabulary (exact)"
    ids = quality.get("kl_ids")
    return None if ids is None else f"the {show(ids)} most likely ids and the lumped rest (a lower bound)"


def _quality_row(name: str, entry: Mapping[str, Any]) -> tuple[Cell, ...]:
    return (
        Cell(metric_label(name)),
        figure_cell(figure(find(entry, "excess") or entry), test_id=f"quality.{name}"),
        cell(number(entry.get("floor"))),
        cell(number(entry.get("margin")), test_id=f"margin.{name}"),
        verdict_cell(entry.get("verdict")),
    )


def _margin_interval(name: str, entry: Mapping[str, Any]) -> Interval | None:
    shown, margin = figure(find(entry, "excess") or entry), number(entry.get("margin"))
    if not margin or shown.value is None or shown.high is None:
        return None
    low = shown.value if shown.low is None else shown.low
    tone = VERDICT_TONES.get(str(entry.get("verdict")), "")
    label = metric_label(name)
    note = f"{label}: {figure_cell(shown).text}, margin {show(margin)}"
    return Interval(label, low / margin, shown.value / margin, shown.high / margin, tone, note)


def _strata(quality: Mapping[str, Any]) -> tuple[Block, ...]:
    rows: list[tuple[Cell, ...]] = []
    metrics = ("kl", "flips", "delta_nll")
    for entry in (as_mapping(item) for item in as_sequence(quality.get("strata"))):
        label = f"{show(entry.get('stratum'))}: {show(entry.get('value'))}"
        rows.append(
            (Cell(label), cell(entry.get("num_requests")), *(cell(number(entry.get(m))) for m in metrics))
        )
    if not rows:
        return (Paragraph(f"By stratum: {record.NOT_RECORDED}", "muted"),)
    caption = "By stratum of the traffic: raw means, before the floor is taken off"
    return (Table(caption, ("Stratum", "Requests", *metrics), tuple(rows)),)


def _worst(quality: Mapping[str, Any]) -> tuple[Block, ...]:
    worst = as_mapping(quality.get("worst_request"))
    if not worst:
        return ()
    text = ", ".join(f"{name} {show(value)}" for name, value in worst.items())
    return (Paragraph(f"Worst request: {text}."),)


def _failing_step(result: Mapping[str, Any]) -> Section:
    step = find(result, "smallest_failing_step")
    if step is None:
        text = "Not recorded: no tried configuration below the winner failed the gate, or none was tried."
        return Section("Smallest step that fails", (Paragraph(text, "muted"),))
    entry = as_mapping(step)
    facts = (
        ("Configuration", cell(record.long_config(entry.get("config", entry)), test_id="failing-config")),
        ("KV bytes per token", figure_cell(figure(find(entry, f"metrics.{BYTES}", BYTES)), "bytes")),
        ("Verdict", verdict_cell(find(entry, "quality.verdict", "verdict", "status"), "failing-verdict")),
        ("Why", cell(find(entry, "quality.reason", "reason"))),
    )
    return Section("Smallest step that fails", (Facts(facts),))


# ---------------------------------------------------------------- the ground it stands on


def _noise(result: Mapping[str, Any]) -> Section:
    noise = as_mapping(find(result, "aa_noise"))
    intro = Paragraph("The baseline against itself: no difference smaller than this can be seen.")
    rows: list[tuple[Cell, ...]] = []
    for name, value in noise.items():
        if figure(value).value is not None or figure(value).high is not None:
            rows.append((Cell(name), figure_cell(figure(value), test_id=f"aa.{name}")))
        elif as_mapping(value):
            rows += [
                (Cell(f"{name}.{k}"), figure_cell(figure(v), test_id=f"aa.{name}.{k}"))
                for k, v in as_mapping(value).items()
            ]
        else:
            rows.append((Cell(name), cell(value, test_id=f"aa.{name}")))
    table = Table("A/A noise", ("Metric", "Measured"), tuple(rows))
    return Section(
        "Noise of the measurement (A/A)", (intro, table if rows else Paragraph(record.NOT_RECORDED, "warn"))
    )


def _held(result: Mapping[str, Any]) -> Section:
    return Section("Requests held in the same budget", (_facts_of(find(result, "held"), "held"),))


def _workload(result: Mapping[str, Any]) -> Section:
    blocks: list[Block] = [_facts_of(find(result, "workload"), "workload")]
    if find(result, "workload.is_synthetic_text") is True:
        blocks.insert(
            0, Paragraph("Generic: the text is synthetic, so lossy settings are not proven by it.", "warn")
        )
    return Section("Workload", tuple(blocks))


def _limits(result: Mapping[str, Any]) -> Section:
    limits = _lines(find(result, "limits"))
    voided = _lines(find(result, "voided_by", "voids", "recipe_body.voided_by"))
    missing = Paragraph(record.NOT_RECORDED, "muted")
    blocks: list[Block] = [Paragraph("Known limits of this result:"), Bullets(limits) if limits else missing]
    blocks += [Paragraph("It no longer holds with:"), Bullets(voided) if voided else missing]
    fallback = find(result, "fallback")
    blocks += [Paragraph("Fallback:"), _facts_of(fallback, "fallback")]
    return Section("Limits, what voids it, fallback", tuple(blocks))


def _repeat(result: Mapping[str, Any]) -> Section:
    command = find(result, "command", "reproduction", "provenance.command")
    lines = command if isinstance(command, str) else " ".join(str(part) for part in as_sequence(command))
    facts = Facts(
        tuple((name, cell(find(result, name, f"provenance.{name}"), test_id=name)) for name in
              ("kvtune_version", "seed", "budget_s", "elapsed_s", "created_at"))
    )  # fmt: skip
    return Section("Repeat it", (Code(lines or record.NOT_RECORDED, "command"), facts))


def _identity(result: Mapping[str, Any]) -> Section:
    return Section("Identity", (_facts_of(find(result, "identity"), "identity"),))


def _lines(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return tuple(f"{name}: {show(item)}" for name, item in as_mapping(value).items())
    return tuple(show(item) for item in as_sequence(value))


def _facts_of(value: Any, name: str) -> Block:
    """Every leaf of a nested mapping as a labelled value, in the order recorded."""
    items = tuple(_leaves(value, ""))
    if not items:
        return Paragraph(
            show(value) if value and not isinstance(value, Mapping) else record.NOT_RECORDED, "muted"
        )
    return Facts(tuple((path, cell(leaf, unit_of(path), test_id=f"{name}.{path}")) for path, leaf in items))


_FOR_VERIFY = frozenset(("behaviour", "profile"))
"""Members of the record that `kvtune verify` compares and nobody reads."""


def _leaves(value: Any, path: str) -> Sequence[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(path, value)] if path else []
    found: list[tuple[str, Any]] = []
    for key, inner in as_mapping(value).items():
        if key in _FOR_VERIFY:
            continue
        found += _leaves(inner, f"{path}.{key}" if path else str(key))
    return found
