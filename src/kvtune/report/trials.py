"""The trials of a study: bytes against damage, bytes against time, parallel coordinates, and one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import (
    Axis as ParallelAxis,
)
from kvtune.report.blocks import (
    Block,
    Cell,
    Kind,
    Paragraph,
    Parallel,
    Point,
    Scatter,
    Section,
    Strand,
    Table,
    cell,
    figure_cell,
    placed,
    verdict_cell,
)
from kvtune.report.record import Figure, Place, as_mapping, as_sequence, figure, find, number

BYTES_PATHS = ("metrics.kv_bytes_per_token", "kv_bytes_per_token")
TPOT_PATHS = ("metrics.tpot_s", "metrics.tpot", "tpot_s")
KL_PATHS = ("quality.metrics.kl.excess", "quality.metrics.kl", "quality.kl", "metrics.kl", "kl")
MAX_ROWS = 2000
MAX_VALUES = 12
"""Values of a setting that an axis has room for; a table per layer has more and is left out."""


def trials_section(result: Mapping[str, Any]) -> Section:
    """Figures and table of all trials, failed and infeasible ones included."""
    trials = [as_mapping(trial) for trial in as_sequence(find(result, "trials"))]
    if not trials:
        return Section("Trials", (Paragraph(record.NOT_RECORDED, "warn"),))
    places = Place(result).at("trials").elements()
    blocks: list[Block] = [
        Paragraph(_summary(result, trials)),
        _damage_figure(result, trials),
        _time_figure(result, trials),
        _parallel(result, trials),
    ]
    rows = tuple(_row(result, place) for place in places[:MAX_ROWS])
    headers = ("Trial", "Configuration", "Status", "KV bytes/token", "KL, upper bound", "TPOT", "Reason")
    blocks.append(Table(f"All {len(trials)} trials, in the order they ran", headers, rows))
    if len(trials) > MAX_ROWS:
        blocks.append(Paragraph(f"{len(trials) - MAX_ROWS} more stand in trials.jsonl.", "warn"))
    return Section("Trials", tuple(blocks))


def _summary(result: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> str:
    """How the trials ended, in a sentence."""
    ends = Counter(record.show(trial.get("status")) for trial in trials)
    counts = ", ".join(f"{count} {status}" for status, count in ends.most_common())
    return (
        f"{len(trials)} configurations ({counts}). On the search half of the requests; what is decided is "
        "measured again on the other half. The line is the Pareto front: nothing that passed is "
        "better in both."
    )


def trial_kl(trial: Mapping[str, Any]) -> float | None:
    """The upper bound of the mean KL, else its value; 0 where every bit is equal."""
    shown = figure(find(trial, *KL_PATHS))
    if shown.high is None and shown.value is None and find(trial, "quality.bit_equal") is True:
        return 0.0
    return shown.value if shown.high is None else shown.high


def trial_tpot(trial: Mapping[str, Any]) -> Figure:
    """Median time per output token in seconds, or the mean where no median is recorded."""
    value = find(trial, *TPOT_PATHS)
    median = number(as_mapping(value).get("p50"))
    return Figure(median) if median is not None else figure(value)


def _kind(result: Mapping[str, Any], trial: Mapping[str, Any]) -> Kind:
    config = trial.get("config")
    if config is not None and config == find(result, "baseline.config"):
        return "baseline"
    if config is not None and config == find(result, "winner.config"):
        return "winner"
    status = _status(trial).upper()
    if status in ("PASS", "COMPLETE", "OK"):
        return "passed"
    return "failed" if status in ("FAIL", "FAILED", "ERROR", "INFEASIBLE") else "other"


def _status(trial: Mapping[str, Any]) -> str:
    """The gate's verdict where the trial got that far, else how it ended."""
    return record.show(find(trial, "quality.verdict", "verdict", "status"))


def _points(
    result: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    height: Callable[[Mapping[str, Any]], float | None],
) -> tuple[Point, ...]:
    points: list[Point] = []
    for trial in trials:
        x, y = figure(find(trial, *BYTES_PATHS)).value, height(trial)
        if x is not None and y is not None:
            config = trial.get("config")
            detail = f"trial {record.show(_number(trial))}: {record.long_config(config)}: {_status(trial)}"
            points.append(Point(x, y, record.short_config(config), _kind(result, trial), detail))
    return tuple(points)


def _damage_figure(result: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Scatter:
    limit = number(find(result, "quality.metrics.kl.margin", "quality.margin.kl", "margin.kl"))
    points = _points(result, trials, trial_kl)
    return Scatter(
        "Size against damage", "KV bytes per token", "mean KL, upper bound (nats)", points,
        limit=limit, limit_label=f"margin {record.tick_text(limit or 0.0)}", is_log_y=True, has_front=True,
    )  # fmt: skip


def _time_figure(result: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Scatter:
    points = _points(result, trials, _tpot_ms)
    return Scatter("Size against time per token", "KV bytes per token", "TPOT (ms)", points, has_front=True)


def _tpot_ms(trial: Mapping[str, Any]) -> float | None:
    seconds = trial_tpot(trial).value
    return None if seconds is None else seconds * 1000


def _parallel(result: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Parallel:
    """Settings that took more than one value, then bytes, KL and TPOT."""
    configs = [as_mapping(trial.get("config")) for trial in trials]
    names = {
        key: _values([c.get(key) for c in configs]) for key in dict.fromkeys(k for c in configs for k in c)
    }
    varied = {key: values for key, values in names.items() if 1 < len(values) <= MAX_VALUES}
    axes = (
        *(ParallelAxis(key, values) for key, values in varied.items()),
        ParallelAxis("KV bytes/token"), ParallelAxis("KL, upper bound", is_log=True),
        ParallelAxis("TPOT", unit="s"),
    )  # fmt: skip
    strands = tuple(
        Strand(
            (*(_index(values, config.get(key)) for key, values in varied.items()),
             figure(find(trial, *BYTES_PATHS)).value, trial_kl(trial), trial_tpot(trial).value),
            _kind(result, trial),
            f"trial {record.show(_number(trial))}: {record.long_config(config)}: {_status(trial)}",
        )
        for trial, config in zip(trials, configs, strict=True)
    )  # fmt: skip
    summary = (
        f"{len(strands)} trials through {', '.join(varied) or 'no setting that varied'} and their results"
    )
    return Parallel("Settings and results of all trials", axes, strands, summary)


def _values(found: Sequence[Any]) -> tuple[str, ...]:
    """Distinct values as texts, numbers in order, others as they came."""
    kept = [value for value in found if value is not None]
    if all(number(value) is not None for value in kept):
        kept = sorted(kept)
    return tuple(dict.fromkeys(record.show(value) for value in kept))


def _index(values: Sequence[str], value: Any) -> float | None:
    text = record.show(value)
    return float(values.index(text)) if text in values else None


def _number(trial: Mapping[str, Any]) -> Any:
    return find(trial, "number", "trial", "id")


def _row(result: Mapping[str, Any], place: Place) -> tuple[Cell, ...]:
    trial = as_mapping(place.value)
    kind = _kind(result, trial)
    label = record.show(_number(trial)) + (f" ({kind})" if kind in ("baseline", "winner") else "")
    prefix = f"trial.{record.show(_number(trial))}"
    kl = trial_kl(trial)
    return (
        Cell(label, pointer=place.pointer),
        Cell(_changes(result, trial), test_id=f"{prefix}.config", pointer=place.at("config").pointer),
        verdict_cell(_status(trial), f"{prefix}.status"),
        placed(place.at("metrics", "kv_bytes_per_token"), "bytes", test_id=f"{prefix}.bytes"),
        Cell("the reference")
        if kind == "baseline" and kl is None
        else Cell("not measured", tone="muted")
        if kl is None
        else replace(cell(kl, test_id=f"{prefix}.kl"), pointer=place.at("quality").pointer),
        _tpot_cell(trial, place, prefix),
        _reason(trial, place),
    )


def _tpot_cell(trial: Mapping[str, Any], place: Place, prefix: str) -> Cell:
    found = trial_tpot(trial)
    if found.value is None:
        return Cell("not measured", tone="muted")
    shown = figure_cell(found, "s", test_id=f"{prefix}.tpot")
    return replace(shown, pointer=place.at("metrics", "tpot_s").pointer)


def _reason(trial: Mapping[str, Any], place: Place) -> Cell:
    """Why it ended as it did; a trial that went through has no reason."""
    found = find(trial, "reason", "quality.reason", "error")
    return replace(cell(found), pointer=place.pointer) if found else Cell("-")


def _changes(result: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    """Only what differs from the baseline: the rest is the same in every row."""
    config, baseline = as_mapping(trial.get("config")), as_mapping(find(result, "baseline.config"))
    if config and config == baseline:
        return "the baseline"
    return record.long_config({key: value for key, value in config.items() if value != baseline.get(key)})
