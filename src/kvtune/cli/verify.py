"""`kvtune verify`: is what a recipe was proven on still here? Seconds, no request is replayed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.options import TraceBlockSize
from kvtune.errors import EngineUnavailableError, HostError, UsageError

if TYPE_CHECKING:
    from kvtune.recipe import Recipe
    from kvtune.standing import Fact
    from kvtune.workload import Shift

__all__ = ["check_layers", "model_folder", "verify"]

CANNOT_TELL = 3
"""Exit code where what it takes to look is not installed here."""
_WORDS = {
    "same": "same", "changed": "CHANGED", "noted": "noted", "unclear": "UNCLEAR",
    "unseen": "not checked", "missing": "MISSING", "accepted": "accepted",
}  # fmt: skip


def verify(
    recipe: Annotated[
        Path | None, typer.Argument(help="recipe.json written by `kvtune tune`.", show_default=False)
    ] = None,
    recipe_option: Annotated[
        Path | None, typer.Option("--recipe", help="The same, as an option.", show_default=False)
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model folder; default the recipe's own.")] = None,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="Today's requests, compared with the proven ones.")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="Python that has vLLM, for a recipe of vLLM.")
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", help="A fact (or group: hardware) that may differ; may be given again."),
    ] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Also load the model and compare the fingerprint of its KV cache.")
    ] = False,
    trace_block_size: TraceBlockSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> int:
    """Compare model, engine, kernels, codecs, machine and traffic with what a recipe was proven on.

    Exit 0 when all of it still stands, 1 when something changed or cannot be told, 3 when the recipe's
    engine is not installed here.
    """
    from kvtune.cli.screen import say
    from kvtune.recipe import Recipe
    from kvtune.standing import accepted, age_fact, recipe_standing, verdict_of

    start_s = time.monotonic()
    path = _one_recipe(recipe, recipe_option)
    found = Recipe.load(path)
    folder = model_folder(found, model)
    facts = [*recipe_standing(found), *_installed(found, folder, vllm_python)]
    if load:
        facts.append(_fingerprint(found, path, folder, facts))
    traffic = _traffic(found, workload, trace_block_size)
    compared = workload is not None and all(f.verdict in ("same", "noted", "unseen") for f in traffic)
    facts += [*traffic, age_fact(found, datetime.now(UTC), is_traffic_compared=compared)]
    facts = accepted(facts, accept or ())
    record = {
        "schema_version": 1, "recipe": str(path), "content_sha256": found.content_sha256,
        "verdict": verdict_of(facts), "facts": [fact.to_dict() for fact in facts],
        "workload": None if workload is None else str(workload), "model": str(folder),
        "not_looked_at": _not_looked_at(found, load=load), "elapsed_s": time.monotonic() - start_s,
        "next_command": _next_command(found, path, facts, workload),
    }  # fmt: skip
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        say(_as_text(record))
    if record["verdict"] == "UNDECIDED" and any(fact.verdict == "missing" for fact in facts):
        return CANNOT_TELL
    return 0 if record["verdict"] == "PASS" else 1


def _one_recipe(argument: Path | None, option: Path | None) -> Path:
    if (argument is None) == (option is None):
        found = "none" if argument is None else "two"
        raise UsageError(f"which recipe? give one recipe.json, found {found}")
    return argument or option or Path()


def model_folder(recipe: Recipe, model: Path | None) -> Path:
    """The folder asked for, else the recipe's own; UsageError if it is not here."""
    named = str(recipe.model.get("path") or "no folder recorded")
    folder = model or Path(named)
    try:
        is_here = folder.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        is_here = False
    if not is_here:
        raise UsageError(f"model folder {str(folder)[:200]!a} is not here; say where it is with --model")
    return folder


# -- what is installed --


def _installed(recipe: Recipe, folder: Path, vllm_python: Path | None) -> list[Fact]:
    from kvtune.host import read_host
    from kvtune.model_folder import model_digests
    from kvtune.standing import Fact, engine_standing, hardware_standing, model_standing

    name = str(recipe.engine["name"])
    hardware: Mapping[str, Any] = read_host().to_dict()
    try:
        if name == "kvtune":
            check_layers(recipe, folder)
            engine, hardware = _own_engine(recipe)
        elif name == "vllm":
            engine = _vllm(recipe, folder, vllm_python)
        else:
            raise UsageError(f"the recipe is for engine {name[:60]!a}; kvtune verifies kvtune and vllm")
        standing = engine_standing(recipe, engine)
    except (HostError, EngineUnavailableError) as error:
        if vllm_python is not None:
            raise
        found = Fact(name="engine", proven=name[:60], found="not here", verdict="missing", why=str(error))
        standing = [found]
    return [
        *model_standing(recipe, model_digests(folder)), *standing, *hardware_standing(recipe, hardware),
    ]  # fmt: skip


def check_layers(recipe: Recipe, folder: Path) -> None:
    """InputFileError where the recipe sets a layer that the model does not have."""
    from kvtune.errors import InputFileError
    from kvtune.model_folder import read_config
    from kvtune.spec import ModelSpec

    cache = recipe.cache_config()
    named = max((*cache.layer_codecs, *cache.squeeze_planes), default=-1)
    num_layers = len(ModelSpec.from_config(read_config(folder)).layers) if named >= 0 else 0
    if named >= num_layers and named >= 0:
        raise InputFileError(
            f"the recipe sets layer {named}; the model in {folder} has layers 0..{num_layers - 1}"
        )


def _own_engine(recipe: Recipe) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    from kvtune.errors import MissingExtraError

    config = recipe.engine_config()
    try:
        from kvtune.engine.facts import engine_facts, hardware_facts
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvtune"):
            raise
        raise MissingExtraError("the kvtune engine", "engine") from None
    return engine_facts(config), hardware_facts(config)


def _vllm(recipe: Recipe, folder: Path, python: Path | None) -> Mapping[str, Any]:
    from kvtune.adapters.vllm_server import VLLMTarget

    engine = recipe.configuration["engine"]
    target = VLLMTarget(
        folder,
        python=python,
        dtype=str(engine.get("dtype", "auto")),
        max_model_len=engine.get("max_model_len"),
    )
    try:
        return target.facts()
    finally:
        target.close()


def _fingerprint(recipe: Recipe, path: Path, folder: Path, facts: Sequence[Fact]) -> Fact:
    """What blocks are hashed under: weights, RoPE regime, codecs of every layer, centres of rotated keys."""
    import warnings

    from kvtune.standing import Fact

    name = "cache.fingerprint"
    if recipe.engine["name"] != "kvtune":
        return Fact(name=name, proven="", found="", verdict="unseen", why="vLLM's cache has none")
    if any(fact.verdict in ("changed", "missing") for fact in facts):
        return Fact(
            name=name, proven="", found="", verdict="unseen", why="the model is not loaded after a change"
        )
    from kvtune.engine import Engine

    effective = recipe.provenance.get("effective")
    proven = effective.get("fingerprint") if isinstance(effective, dict) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they say is among the facts
        engine = Engine.from_recipe(path, model=folder)
    found = engine.fingerprint.hex()
    engine.close()
    if not isinstance(proven, str):
        why = "the recipe does not record it; run `kvtune tune` again"
        return Fact(name=name, proven="not recorded", found=found[:12], verdict="unclear", why=why)
    return Fact(
        name=name, proven=proven[:12], found=found[:12], verdict="same" if proven == found else "changed"
    )


# -- traffic --


def _traffic(recipe: Recipe, workload: Path | None, block_size: int | None) -> list[Fact]:
    from kvtune.errors import InputFileError
    from kvtune.standing import Fact
    from kvtune.workload import load_workload, workload_drift

    if workload is None:
        why = "give --workload with today's requests"
        return [Fact(name="workload", proven="recorded", found="", verdict="unseen", why=why)]
    recorded, profile = recipe.workload, recipe.workload.get("profile")
    size = block_size if block_size is not None else recorded.get("block_size")
    if size is not None and (type(size) is not int or not 1 <= size <= 1 << 20):
        raise InputFileError(
            "the recipe's workload.block_size must be a number of tokens; run `kvtune tune` again"
        )
    today = load_workload(workload, trace_block_size=size)
    if profile is None:
        why = "the recipe does not record its traffic; run `kvtune tune` again"
        return [Fact(name="workload", proven="not recorded", found="", verdict="unclear", why=why)]
    if not isinstance(profile, dict):
        raise InputFileError("the recipe's workload.profile must be an object; run `kvtune tune` again")
    if today.sha256 and today.sha256 == recorded.get("sha256") and profile.get("num_requests") == len(
        [r for r in today.requests if r.problem is None]
    ):  # fmt: skip
        return [Fact(name="workload", proven=today.sha256[:12], found=today.sha256[:12], verdict="same",
                     why="byte for byte what it was proven on")]  # fmt: skip
    has_slo = bool(_objective(recipe).get("slo"))
    return [_as_fact(shift, has_slo=has_slo) for shift in workload_drift(profile, today)]


def _objective(recipe: Recipe) -> Mapping[str, Any]:
    objective = recipe.provenance.get("objective")
    return objective if isinstance(objective, dict) else {}


def _as_fact(shift: Shift, *, has_slo: bool) -> Fact:
    from kvtune.standing import Fact

    verdict = {"drifted": "changed"}.get(shift.verdict, shift.verdict)
    if shift.is_speed and verdict == "changed" and not has_slo:
        verdict = "noted"
    why = f"give more requests: {shift.why}" if verdict == "unclear" else shift.why
    name = f"workload.{shift.name.replace(' ', '_')}"
    return Fact(name=name, proven=shift.proven, found=shift.found, verdict=verdict, why=why)


# -- what is said --


def _not_looked_at(recipe: Recipe, *, load: bool) -> list[str]:
    out = ["answers: no request was replayed; `kvtune check` judges them again",
           "speed: nothing was timed"]  # fmt: skip
    if recipe.engine["name"] == "vllm":
        out.append("vLLM's kernels and quantisation: its version and attention backend stand for them")
        out.append("vLLM's settings on the servers that run it: only the installation was asked")
    elif not load:
        out.append("centres of rotated keys and the RoPE regime: --load compares them")
    return out


def _next_command(recipe: Recipe, path: Path, facts: Sequence[Fact], workload: Path | None) -> str | None:
    """Traffic alone moved: the gate may still pass. Anything else that changed needs a new proof."""
    import shlex

    moved = [fact.name for fact in facts if fact.verdict == "changed"]
    file = "FILE" if workload is None else shlex.quote(str(workload))
    if moved and all(name.startswith(("workload.", "recipe.age")) for name in moved):
        return f"kvtune check --recipe {shlex.quote(str(path))} --workload {file}"
    if not moved:
        return None
    flags = " --engine vllm" if recipe.engine["name"] == "vllm" else ""
    flags += " --squeeze" if recipe.configuration["cache"].get("squeeze_planes") else ""
    return f"kvtune tune {shlex.quote(str(recipe.model.get('path', 'MODEL_DIR')))} --workload {file}{flags}"


def _as_text(record: Mapping[str, Any]) -> str:
    from kvtune.cli.table import text_table

    facts: Sequence[Mapping[str, str]] = record["facts"]
    rows = [
        [fact["name"], _WORDS[fact["verdict"]], _cut(fact["proven"]), _cut(fact["found"]), fact["why"]]
        for fact in facts
    ]
    lines = [f"verdict     {record['verdict']}: {_reason(facts)}", ""]
    lines += text_table(("fact", "verdict", "proven", "found", ""), rows, left=5)
    lines += ["", *(f"not looked at  {text}" for text in record["not_looked_at"])]
    if record["next_command"]:
        lines.append(f"next           {record['next_command']}")
    return "\n".join(lines)


def _reason(facts: Sequence[Mapping[str, str]]) -> str:
    for verdict, words in (("changed", "changed"), ("missing", "not here"), ("unclear", "cannot be told")):
        names = [fact["name"] for fact in facts if fact["verdict"] == verdict]
        if names:
            return f"{', '.join(names)} {words}"
    checked = sum(fact["verdict"] != "unseen" for fact in facts)
    return f"all {checked} facts checked still stand"


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
