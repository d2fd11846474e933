"""`kvtune check`: does a recipe still keep the answers, on this traffic and this machine, today?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kvtune.cli.options import HighValue, Judge
from kvtune.cli.screen import say
from kvtune.config import MAX_SEED, EngineConfig
from kvtune.errors import InputFileError, UsageError

if TYPE_CHECKING:
    from kvtune.quality import GateCost, GateQuestions, Margin, QualityVerdict
    from kvtune.recipe import Recipe
    from kvtune.target import Target
    from kvtune.workload import Materialised

__all__ = ["check"]


def check(
    recipe: Annotated[Path, typer.Option("--recipe", help="recipe.json written by `kvtune tune`.")],
    workload: Annotated[Path, typer.Option("--workload", help="Requests to judge the recipe on.")],
    model: Annotated[Path | None, typer.Option(help="Model folder; default the recipe's own.")] = None,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="Python that has vLLM, for a recipe of vLLM.")
    ] = None,
    num_requests: Annotated[int, typer.Option(min=8, help="Requests to replay.")] = 64,
    high_value: HighValue = None,
    judge: Judge = None,
    trace_block_size: Annotated[
        int | None, typer.Option(help="Prompt tokens per hash id of a trace.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Shrink a trace's recorded lengths by this factor.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the choice of requests and of the statistics.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> int:
    """Replay requests under a recipe and under its baseline; exit 0 on PASS, 1 on any other verdict.

    Where the recipe lets low planes go under memory pressure, reading without all of them is judged too.
    """
    from kvtune.cli.gate_questions import gate_questions
    from kvtune.cli.tune_input import materialised, open_target, read_workload
    from kvtune.cli.verify import check_layers, model_folder
    from kvtune.quality import margin_named
    from kvtune.recipe import Recipe

    found = Recipe.load(recipe)
    baseline = _member(found.baseline, "baseline", "configuration")
    proven_at = _member(found.provenance, "provenance", "margin")
    margin = margin_named(str(proven_at.get("name")), probes=_share(proven_at.get("probes")))
    requests = read_workload(workload, demo=False, seed=seed, block_size=trace_block_size, limit=None)
    folder = model_folder(found, model)
    if found.engine["name"] == "kvtune":
        check_layers(found, folder)
    config = EngineConfig.from_dict(found.configuration["engine"])
    target, vocab_size, length = open_target(found.engine["name"], folder, config, vllm_python)
    tokens = materialised(requests, folder, vocab_size, length, scale=scale, seed=seed)
    questions = gate_questions(
        requests, tokens, folder, max_model_len=length, seed=seed, high_value=high_value, judge=judge
    )
    verdicts = _judged(target, found, baseline, tokens, questions, margin, num_requests, seed)
    record = {
        "schema_version": 1, "recipe": str(recipe), "content_sha256": found.content_sha256,
        "workload": str(workload), "voided": _voided(found, target.identity()["model"]),
        **_together(*verdicts),
    }  # fmt: skip
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        say(_as_text(record))
    return 0 if record["verdict"] == "PASS" and not record["voided"] else 1


# -- judging --


def _judged(
    target: Target, recipe: Recipe, baseline: Mapping[str, Any], tokens: Materialised,
    questions: GateQuestions, margin: Margin, num_requests: int, seed: int,
) -> tuple[dict[str, Any], dict[str, Any] | None]:  # fmt: skip
    """The verdict on what the recipe serves, and, where it lets low planes go, on reading without them."""
    import numpy as np

    from kvtune.cli.tune_input import VLLM_TOP
    from kvtune.quality import ReplaySettings, ask_baseline, judge_candidate, record_reference
    from kvtune.target import ReadsPlanes
    from kvtune.tune import SearchSpace, choose_for_quality

    rng = np.random.default_rng(seed)
    budget = _budget(recipe)
    settings = ReplaySettings(num_decode=0, max_top=VLLM_TOP) if target.name == "vllm" else ReplaySettings()
    with target.start(baseline, kv_budget_bytes=budget) as running:
        reference = record_reference(
            running, choose_for_quality(tokens.requests, num_requests, rng), settings,
            is_synthetic_text=tokens.is_synthetic_text,
        )  # fmt: skip
        gate = ask_baseline(running, reference, questions, margin=margin, aa_chunk=settings.aa_chunk)
    # without the planes' setting nothing is lowered here but what is lowered on purpose
    knobs = {name: value for name, value in recipe.knobs.items() if name != "squeeze_planes"}
    is_lossy = SearchSpace(target.knobs()).is_lossy(knobs)
    planes = recipe.cache_config().squeeze_planes if recipe.engine["name"] == "kvtune" else {}
    with target.start(knobs, kv_budget_bytes=budget) as running:
        nominal = _as_record(*judge_candidate(running, gate, is_lossy=is_lossy, rng=rng))
        if not planes:
            return nominal, None
        if not isinstance(running, ReadsPlanes):
            raise UsageError(
                f"engine {target.name} cannot read one plane of two, so squeeze_planes is unproven"
            )
        with running.reading(planes):
            lowered = _as_record(*judge_candidate(running, gate, is_lossy=True, rng=rng))
    return nominal, {"planes": {str(n): list(pair) for n, pair in sorted(planes.items())}, **lowered}


def _budget(recipe: Recipe) -> int | None:
    from kvtune.config import parse_bytes

    budget = recipe.configuration["cache"].get("kv_budget")
    return None if budget is None else parse_bytes(budget)


def _as_record(quality: QualityVerdict, cost: GateCost) -> dict[str, Any]:
    return {**quality.to_dict(), "forward_passes": round(cost.passes, 3)}


def _together(nominal: dict[str, Any], lowered: dict[str, Any] | None) -> dict[str, Any]:
    """One verdict: a recipe passes if all it allows passes. Metrics are those of the nominal reading."""
    out = {**nominal, "nominal": {name: nominal[name] for name in ("verdict", "reason")}, "lowered": lowered}
    if lowered is None or lowered["verdict"] == "PASS" or nominal["verdict"] == "FAIL":
        return out
    if nominal["verdict"] != "PASS" and lowered["verdict"] != "FAIL":
        return out
    out["reason"] = f"read without the low planes that may go: {lowered['reason']}"
    return {**out, "verdict": lowered["verdict"], "proven": False}


# -- what the recipe says --


def _member(section: Any, name: str, member: str) -> dict[str, Any]:
    """What a recipe must say to be judged again."""
    found = section.get(member)
    if not isinstance(found, dict):
        raise InputFileError(
            f"the recipe lacks {name}.{member}, so it cannot be judged; run `kvtune tune` again"
        )
    return cast("dict[str, Any]", found)


def _share(value: Any) -> float | None:
    """A margin of right-or-wrong answers; recipes of earlier versions have none."""
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else None


def _voided(recipe: Recipe, now: Mapping[str, Any]) -> list[str]:
    """What changed of the model since the recipe was proven."""
    from kvtune.standing import model_standing

    return [
        f"{fact.name.removeprefix('model.')} changed since the recipe was proven"
        for fact in model_standing(recipe, now) if fact.verdict in ("changed", "unclear")
    ]  # fmt: skip


def _as_text(record: dict[str, Any]) -> str:
    from kvtune.cli.gate_questions import answers_text, probes_text

    lines = [f"verdict     {record['verdict']}: {record['reason']}"]
    lines += [*_metric_lines(record), *probes_text(record), *answers_text(record)]
    if record["lowered"] is not None:
        lowered = record["lowered"]
        lines.append(f"lowered     {lowered['verdict']}: {lowered['reason']}")
        lines += [*_metric_lines(lowered), *probes_text(lowered), *answers_text(lowered)]
    lines += [f"voided      {reason}" for reason in record["voided"]]
    lines += [f"note        {note}" for note in record["notes"]]
    lines += [f"cannot see  {spot}" for spot in record["cannot_see"]]
    lines.append(f"on          {record['num_requests']} requests, {record['num_clusters']} sessions")
    return "\n".join(lines)


def _metric_lines(quality: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, metric in quality["metrics"].items():
        excess = metric["excess"]
        bounds = ", ".join("-" if excess[b] is None else f"{excess[b]:.4g}" for b in ("low", "high"))
        lines.append(f"{name:<17} {excess['value']:.4g} [{bounds}], margin {metric['margin']:g}")
    return lines
