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
    from kvtune.recipe import Recipe

__all__ = ["check"]


def check(
    recipe: Annotated[Path, typer.Option("--recipe", help="recipe.json written by `kvtune tune`.")],
    workload: Annotated[Path, typer.Option("--workload", help="Requests to judge the recipe on.")],
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
    """Replay requests under a recipe and under its baseline; exit 0 on PASS, 1 on any other verdict."""
    import numpy as np

    from kvtune.cli.gate_questions import gate_questions
    from kvtune.cli.tune import VLLM_TOP, materialised, open_target, read_workload
    from kvtune.config import parse_bytes
    from kvtune.quality import (
        ReplaySettings,
        ask_baseline,
        judge_candidate,
        margin_named,
        record_reference,
    )
    from kvtune.recipe import Recipe
    from kvtune.tune import SearchSpace, choose_for_quality

    found = Recipe.load(recipe)
    baseline = _member(found.baseline, "baseline", "configuration")
    proven_at = _member(found.provenance, "provenance", "margin")
    margin = margin_named(str(proven_at.get("name")), probes=_share(proven_at.get("probes")))
    requests = read_workload(workload, demo=False, seed=seed, block_size=trace_block_size, limit=None)
    folder = Path(str(found.model.get("path", "")))
    if not folder.is_dir():
        raise UsageError(f"the recipe's model folder {folder} is not here; put the model back or tune again")
    config = EngineConfig.from_dict(found.configuration["engine"])
    target, vocab_size, length = open_target(found.engine["name"], folder, config, vllm_python)
    tokens = materialised(requests, folder, vocab_size, length, scale=scale, seed=seed)
    budget = found.configuration["cache"].get("kv_budget")
    budget_bytes = None if budget is None else parse_bytes(budget)
    rng = np.random.default_rng(seed)
    settings = ReplaySettings()
    if target.name == "vllm":
        settings = ReplaySettings(num_decode=0, max_top=VLLM_TOP)
    questions = gate_questions(
        requests, tokens, folder, max_model_len=length, seed=seed, high_value=high_value, judge=judge
    )
    with target.start(baseline, kv_budget_bytes=budget_bytes) as running:
        reference = record_reference(
            running, choose_for_quality(tokens.requests, num_requests, rng), settings,
            is_synthetic_text=tokens.is_synthetic_text,
        )  # fmt: skip
        gate = ask_baseline(running, reference, questions, margin=margin, aa_chunk=settings.aa_chunk)
    with target.start(found.knobs, kv_budget_bytes=budget_bytes) as running:
        quality, cost = judge_candidate(
            running, gate, is_lossy=SearchSpace(target.knobs()).is_lossy(found.knobs), rng=rng
        )
    verdict = {**quality.to_dict(), "forward_passes": round(cost.passes, 3)}
    record = {
        "schema_version": 1, "recipe": str(recipe), "content_sha256": found.content_sha256,
        "workload": str(workload), "voided": _voided(found, target.identity()["model"]), **verdict,
    }  # fmt: skip
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        say(_as_text(record))
    return 0 if record["verdict"] == "PASS" and not record["voided"] else 1


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
    for name, metric in record["metrics"].items():
        excess = metric["excess"]
        bounds = ", ".join("-" if excess[b] is None else f"{excess[b]:.4g}" for b in ("low", "high"))
        lines.append(f"{name:<17} {excess['value']:.4g} [{bounds}], margin {metric['margin']:g}")
    lines += [*probes_text(record), *answers_text(record)]
    lines += [f"voided      {reason}" for reason in record["voided"]]
    lines += [f"note        {note}" for note in record["notes"]]
    lines += [f"cannot see  {spot}" for spot in record["cannot_see"]]
    lines.append(f"on          {record['num_requests']} requests, {record['num_clusters']} sessions")
    return "\n".join(lines)
