"""What `kvtune tune` shows: stage and time left while it runs, the decision when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.config import format_bytes, format_layer_codecs
from kvtune.printable import one_line

if TYPE_CHECKING:
    from kvtune.tune import ProgressEvent, TuneSettings

__all__ = ["TuneProgress", "tune_text"]


class TuneProgress:
    """Stage and time left on stderr: a live line on a terminal, one line per trial elsewhere."""

    def __init__(self, settings: TuneSettings) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        text = f"tuning, at most {settings.budget_s:.0f} s"
        self._status = self._console.status(text) if self._console.is_terminal else None

    def __enter__(self) -> TuneProgress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, event: ProgressEvent) -> None:
        minutes, seconds = divmod(max(0, round(event.time_left_s)), 60)
        line = f"{minutes}:{seconds:02d} left  {event.stage}: {one_line(event.message, 400)}"
        if self._status is not None:
            best = "" if event.best is None else f"  (best so far {_codecs(event.best['config'])})"
            self._status.update(line.replace("[", "\\[") + best)
        if event.trial is None and self._status is not None:
            return
        if event.trial is not None and event.trial["status"] == "pruned":
            return
        self._console.print(line, markup=False)


def tune_text(record: Mapping[str, Any], folder: Path) -> str:
    from kvtune.cli.gate_questions import answers_text, probes_text

    baseline, winner, quality = record["baseline"], record["winner"], record["quality"]
    before, after = (s["metrics"]["kv_bytes_per_token"] for s in (baseline, winner))
    held = record["held"]
    held_before, held_after = (int(held[side]["value"]) for side in ("baseline", "winner"))
    lines = [
        _winner_line(record),
        f"KV bytes    {after:,.0f} of {before:,.0f} per token at {record['context']:,} tokens "
        f"({after / before:.3f}x), {1 - after / before:.1%} saved",
        f"held        {held_after:,} requests instead of {held_before:,} in "
        f"{format_bytes(held['kv_budget_bytes'])} ({held['winner']['source']})",
        *_speed_lines(record),
        f"verdict     {quality['verdict']}: {quality['reason']}",
        *(f"            {note}" for note in quality["notes"]),
        *probes_text(quality),
        *answers_text(quality),
        *_squeeze_lines(record["squeeze"]),
        _failing_line(record["smallest_failing_step"], before),
        *(f"limit       {limit}" for limit in record["limits"] if limit.startswith("speed")),
        f"search      {len(record['trials'])} trials in {record['elapsed_s']:.0f} s: {record['stop_reason']}",
        f"recipe      {record['recipe']}",
        f"report      {folder / 'report.html'}",
        f"next        {record['next_command']}",
    ]
    return "\n".join(lines)


def _winner_line(record: Mapping[str, Any]) -> str:
    if record["status"] == "winner":
        return f"winner      {_knobs(record['winner']['config'])}"
    why = f": {record['rejected'][-1]['reason']}" if record["rejected"] else ""
    return f"winner      the baseline, no significant gain{why}"


def _speed_lines(record: Mapping[str, Any]) -> list[str]:
    labels = {"tpot_s.mean": "TPOT", "ttft_s.p95": "TTFT p95", "goodput": "goodput"}
    lines: list[str] = []
    for name, label in labels.items():
        gain, noise = record["gain"].get(name), record["aa_noise"].get(name)
        if gain is None or gain["low"] is None:
            continue
        reading = "" if gain["significant"] else ", within noise"
        floor = (
            "" if not noise or noise["low"] is None else f"; A/A [{noise['low']:.3f}, {noise['high']:.3f}]"
        )
        bounds = f"[{gain['low']:.3f}, {gain['high']:.3f}]"
        lines.append(f"{label:<11} {gain['ratio']:.3f}x {bounds}{reading}{floor}")
    return lines


def _squeeze_lines(proof: Mapping[str, Any] | None) -> list[str]:
    """Which low planes may go while memory is short, where that was asked for."""
    if proof is None:
        return []
    quality, tried = proof["quality"], proof["tried"]
    if quality is None:
        why = proof["skipped"] or f"{tried[-1]['verdict']}: {tried[-1]['reason']}"
        return [f"squeeze     no low plane may go: {why}"]
    share = proof["lowered_bytes_per_token"] / proof["bytes_per_token"]
    sides = f"{proof['num_proven']} of {proof['num_sides']} sides"
    return [
        f"squeeze     low planes of {sides} may go, {share:.3f}x of the winner's bytes stay; "
        f"{quality['verdict']}: {quality['reason']}"
    ]


def _failing_line(step: Mapping[str, Any] | None, before: float) -> str:
    if step is None:
        return "next step   no smaller configuration failed the gate within this search space and budget"
    size = step["metrics"]["kv_bytes_per_token"] / before
    quality = step["quality"]
    return f"next step   {_codecs(step['config'])} ({size:.3f}x) {quality['verdict']}: {quality['reason']}"


def _codecs(config: Mapping[str, Any]) -> str:
    names = [f"{k} {config[k]}" for k in ("k_codec", "v_codec", "kv_dtype") if k in config]
    return ", ".join([*names, *_layers(config)]) or _knobs(config)


def _knobs(config: Mapping[str, Any]) -> str:
    return ", ".join(
        [f"{name} {value}" for name, value in config.items() if name != "layer_codecs"] + _layers(config)
    )


def _layers(config: Mapping[str, Any]) -> list[str]:
    """Codecs of the layers that have their own, in one text."""
    return [f"but {format_layer_codecs(config['layer_codecs'])}"] if config.get("layer_codecs") else []
