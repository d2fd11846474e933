"""The trials of a study: two figures (bytes against damage, bytes against time per token) and one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import (
    Block,
    Cell,
    Kind,
    Paragraph,
    Point,
    Scatter,
    Section,
    Table,
    cell,
    figure_cell,
    verdict_cell,
)
from kvtune.report.record import Figure, as_mapping, as_sequence, figure, find, number

BYTES_PATHS = ("metrics.kv_bytes_per_token", "kv_bytes_per_token")
TPOT_PATHS = ("metrics.tpot_s", "metrics.tpot", "tpot_s")
KL_PATHS = ("quality.metrics.kl.excess", "quality.metrics.kl", "quality.kl", "metrics.kl", "kl")
MAX_ROWS = 2000


def trials_section(result: Mapping[str, Any]) -> Section:
    """Figures and table of all trials, failed and infeasible ones included."""
    trials = [as_mapping(trial) for trial in as_sequence(find(result, "trials"))]
    if not trials:
        return Section("Trials", (Paragraph(record.NOT_RECORDED, "warn"),))
    blocks: list[Block] = [_damage_figure(result, trials), _time_figure(result, trials)]
    rows = tuple(_row(result, trial) for trial in trials[:MAX_ROWS])
    headers = ("Trial", "Configuration", "Status", "KV bytes/token", "KL, upper bound", "TPOT", "Reason")
    blocks.append(Table(f"All {len(trials)} trials, in the order they ran", headers, rows))
    if len(trials) > MAX_ROWS:
        blocks.append(Paragraph(f"{len(trials) - MAX_ROWS} more stand in trials.jsonl.", "warn"))
    return Section("Trials", tuple(blocks))


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
        limit=limit, limit_label=f"margin {record.show(limit)}", is_log_y=True,
    )  # fmt: skip


def _time_figure(result: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Scatter:
    points = _points(result, trials, _tpot_ms)
    return Scatter("Size against time per token", "KV bytes per token", "TPOT (ms)", points, has_front=True)


def _tpot_ms(trial: Mapping[str, Any]) -> float | None:
    seconds = trial_tpot(trial).value
    return None if seconds is None else seconds * 1000


def _number(trial: Mapping[str, Any]) -> Any:
    return find(trial, "number", "trial", "id")


def _row(result: Mapping[str, Any], trial: Mapping[str, Any]) -> tuple[Cell, ...]:
    kind = _kind(result, trial)
    label = record.show(_number(trial)) + (f" ({kind})" if kind in ("baseline", "winner") else "")
    prefix = f"trial.{record.show(_number(trial))}"
    kl = trial_kl(trial)
    return (
        Cell(label),
        Cell(record.long_config(trial.get("config")), test_id=f"{prefix}.config"),
        verdict_cell(_status(trial), f"{prefix}.status"),
        figure_cell(figure(find(trial, *BYTES_PATHS)), "bytes", test_id=f"{prefix}.bytes"),
        cell(kl, test_id=f"{prefix}.kl"),
        figure_cell(trial_tpot(trial), "s", test_id=f"{prefix}.tpot"),
        cell(find(trial, "reason", "quality.reason", "error")),
    )
