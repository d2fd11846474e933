"""`kvtune simulate --mode serve`: what a server would achieve on a trace; and `--calibrate`, which measures
the engine once so that the simulation's step times are this machine's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.options import Html, TraceBlockSize, TraceFormat
from kvtune.cli.screen import say
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.config import CacheConfig, SchedulerConfig
    from kvtune.plan import ModelSource
    from kvtune.sim import CostModel, ServeTargets, SimulationRun, SimWorkload
    from kvtune.spec import ModelSpec
    from kvtune.workload import Workload

__all__ = ["serve"]


def serve(
    trace: Annotated[
        Path | None, typer.Argument(help="Request file or trace: JSON, JSONL or CSV, plain or gzip.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model folder, config.json, or a bundled model id.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Settings of the server: a recipe.")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", help="Measure the engine on this model folder and write --out.", metavar="MODEL"
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Step times measured by --calibrate.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Step times from this card's data sheet, e.g. H100-80GB.")
    ] = None,
    kv_budget: Annotated[
        str | None, typer.Option("--kv-budget", help="Memory for KV blocks, e.g. 24GiB.")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option("--kv-dtype", help="How K and V are stored: bf16, int8, int4, ...")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences running at once.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens computed per step.")
    ] = None,
    rate_factor: Annotated[
        float, typer.Option(help="Send the trace this many times as fast as recorded.")
    ] = 1.0,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first so many requests.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cap on generated tokens per request.")
    ] = None,
    slo: Annotated[
        str | None, typer.Option("--slo", help="Targets, e.g. ttft_p95=300ms,tpot_p95=50ms.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=5, max=3600, help="How long --calibrate measures.")] = 45.0,
    out: Annotated[Path, typer.Option("--out", help="File that --calibrate writes.")] = Path(
        "calibration.json"
    ),
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per block; default the trace's own, 16 for text.")
    ] = None,
    format_: TraceFormat = "auto",
    trace_block_size: TraceBlockSize = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the result, with every request.")
    ] = None,
    html: Html = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Simulate serving a trace: latencies, goodput, hits, preemptions, utilisation, overload."""
    if calibrate is not None:
        facts = _calibrate(calibrate, recipe=recipe, seconds=seconds, out=out)
        if as_json:
            print(json.dumps(facts))
        else:
            say(_calibrated_text(facts))
        return
    for name, file in (("--html", html), ("--save", save)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{name} {file}: there is no folder {file.absolute().parent}; create it first")
    if trace is None:
        raise UsageError("nothing to simulate: give a TRACE, or --calibrate MODEL")
    server = _server(model, recipe, calibration, gpu).with_settings(
        {"kv_budget": kv_budget, "k_codec": kv_dtype, "v_codec": kv_dtype, "block_size": block_size},
        {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens},
    )
    targets = None if slo is None else _targets(slo)
    from kvtune.workload import load_workload

    recorded = load_workload(trace, format=format_, trace_block_size=trace_block_size)
    workload = _requests(recorded, server, num_prompts, max_tokens).scaled_in_time(rate_factor)
    run = _simulate(server, workload)
    result = _result(server, workload, run, targets, trace=trace, rate_factor=rate_factor)
    if save is not None:
        from kvtune.recipe import write_atomically

        detailed = _result(server, workload, run, targets, trace=trace, rate_factor=rate_factor, details=True)
        write_atomically(save, json.dumps(detailed, allow_nan=False) + "\n")
    if html is not None:
        _write_page(html, result, replace(recorded, requests=recorded.requests[:num_prompts]))
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        say(_as_text(result))


def _write_page(path: Path, result: dict[str, Any], workload: Workload) -> None:
    from kvtune.recipe import write_atomically
    from kvtune.report import render_simulation
    from kvtune.workload import workload_statistics

    write_atomically(path, render_simulation({**result, "statistics": workload_statistics(workload)}))


# -- the server


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """What is simulated, and what the reader should know about it."""

    source: ModelSource
    spec: ModelSpec
    cache: CacheConfig
    scheduler: SchedulerConfig
    max_model_len: int
    cost: CostModel
    facts: dict[str, Any]
    """What the calibration was measured on; empty without one."""
    notes: tuple[str, ...] = ()

    def with_settings(self, cache: dict[str, Any], scheduler: dict[str, Any]) -> _Server:
        """Other settings where a value is given; codecs for all layers, or `auto`, the checkpoint's."""
        given = {name: value for name, value in cache.items() if value is not None}
        if "k_codec" in given:
            given["layer_codecs"] = {}
            codecs = {n: self.spec.dtype for n in ("k_codec", "v_codec") if given[n] == "auto"}
            given |= codecs
        limits = {name: value for name, value in scheduler.items() if value is not None}
        changed = replace(
            self, cache=replace(self.cache, **given), scheduler=replace(self.scheduler, **limits)
        )
        return replace(changed, notes=(*self.notes, *_differences(changed)))


def _server(
    model: str | None, recipe_path: Path | None, calibration: Path | None, gpu: str | None
) -> _Server:
    from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
    from kvtune.plan import find_model
    from kvtune.recipe import Recipe
    from kvtune.sim import load_calibration
    from kvtune.spec import ModelSpec

    recipe = None if recipe_path is None else Recipe.load(recipe_path)
    name = model or (None if recipe is None else recipe.model.get("path"))
    if name is None:
        raise UsageError("whose server? give --model: a model folder, config.json, or a bundled model id")
    if calibration is not None and gpu is not None:
        raise UsageError("--calibration holds measured step times, --gpu assumes them: give one")
    source = find_model(str(name))
    spec = ModelSpec.from_config(source.config)
    fitted = None if calibration is None else load_calibration(calibration)
    facts = {} if fitted is None else dict(fitted.facts)
    cache = CacheConfig() if recipe is None else recipe.cache_config()
    scheduler = SchedulerConfig() if recipe is None else recipe.scheduler_config()
    if recipe is None:
        cache, scheduler = _as_calibrated(cache, scheduler, facts)
    config = EngineConfig() if recipe is None else recipe.engine_config()
    length = config.max_model_len or facts.get("max_model_len") or spec.max_model_len
    if length is None:
        raise UsageError(f"{source.name}: its config does not say how long a sequence may be")
    cost, budget, notes = _step_times(fitted, gpu, source, spec)
    if budget is not None:
        cache = replace(cache, kv_budget=budget)
    return _Server(
        source=source, spec=spec, cache=cache, scheduler=scheduler, max_model_len=int(length), cost=cost,
        facts=facts, notes=notes,
    )  # fmt: skip


def _as_calibrated(
    cache: CacheConfig, scheduler: SchedulerConfig, facts: dict[str, Any]
) -> tuple[CacheConfig, SchedulerConfig]:
    """The settings that were measured, where nothing else is asked for."""
    from kvtune.config import CacheConfig, SchedulerConfig

    known = ("k_codec", "v_codec", "layer_codecs", "block_size", "kv_budget")
    cache = CacheConfig.from_dict({**cache.to_dict(), **{n: facts[n] for n in known if n in facts}})
    limits = ("max_num_seqs", "max_num_batched_tokens")
    return cache, SchedulerConfig.from_dict(
        {**scheduler.to_dict(), **{n: facts[n] for n in limits if n in facts}}
    )


def _step_times(
    fitted: CostModel | None, gpu: str | None, source: ModelSource, spec: ModelSpec
) -> tuple[CostModel, int | None, tuple[str, ...]]:
    """(cost model, KV budget of the card if one is named, notes)."""
    if fitted is not None:
        return fitted, None, ()
    from kvtune.plan import PlanRequest, find_gpu, kv_budget
    from kvtune.plan.weights import dense_weights_bytes
    from kvtune.sim import RooflineCost
    from kvtune.spec import text_config

    weights = source.weights_bytes or dense_weights_bytes(source.config, spec)
    if gpu is None or weights is None:
        lack = "how large its weights are is not known" if gpu is not None else "no --gpu is named"
        raise UsageError(
            f"no step times: {lack}; measure them (`kvtune simulate --calibrate MODEL`) and give "
            "--calibration FILE, or name a card with --gpu and a model folder or a plain dense model"
        )
    card = find_gpu(gpu)
    if card.bandwidth is None or card.flops is None:
        raise UsageError(
            f"{card.name}: bandwidth or 16-bit throughput is not known; measure with --calibrate"
        )
    budget = kv_budget(card, 1, weights, PlanRequest(gpu=card.name)).kv_bytes
    if not budget:
        raise UsageError(f"{source.name} does not fit into {card.name}: the weights alone are too large")
    heads = int(text_config(source.config)[0].get("num_attention_heads") or 0)
    widest = max((layer.k_head_dim + layer.v_head_dim for layer in spec.layers), default=0)
    cost = RooflineCost(
        bandwidth=card.bandwidth, flops=card.flops, weights_bytes=weights,
        num_parameters=source.active_parameters or weights / 2, pair_flops=2.0 * heads * widest,
        hardware=card.name,
    )  # fmt: skip
    note = f"step times are a roofline of {card.name}'s data sheet, not measured: shapes hold, levels may not"
    return cost, budget, (note,)


def _differences(server: _Server) -> tuple[str, ...]:
    """Where the simulated server is not the one whose steps were measured."""
    if not server.facts:
        return ()
    from kvtune.host import read_host
    from kvtune.model_folder import config_sha256

    now = {
        "config_sha256": config_sha256(server.source.config),
        "k_codec": server.cache.k_codec,
        "v_codec": server.cache.v_codec,
        "block_size": server.cache.block_size,
        "hardware": read_host().to_dict(),
    }
    titles = {"config_sha256": "model", "hardware": "machine"}
    facts = server.facts
    changed = [
        titles.get(name, name) for name, value in now.items() if name in facts and facts[name] != value
    ]
    if not changed:
        return ()
    return (f"step times were measured with another {', '.join(changed)}: expect larger errors",)


def _targets(text: str) -> ServeTargets:
    from kvtune.sim import ServeTargets
    from kvtune.tune import parse_slo

    slo = parse_slo(text)
    return ServeTargets(ttft_s=slo.ttft_p95_s, tpot_s=slo.tpot_p95_s)


# -- running


def _requests(
    recorded: Workload, server: _Server, num_prompts: int | None, max_tokens: int | None
) -> SimWorkload:
    from kvtune.sim import of_trace

    workload = replace(recorded, requests=recorded.requests[:num_prompts])
    made = of_trace(
        workload,
        block_size=server.cache.block_size,
        max_model_len=server.max_model_len,
        max_tokens=max_tokens,
    )
    return replace(made, notes=(*workload.notes, *made.notes))


def _simulate(server: _Server, workload: SimWorkload) -> SimulationRun:
    from kvtune.cli.progress import TimeLeft
    from kvtune.sim import Simulation

    simulation = Simulation(
        server.spec, cache=server.cache, scheduler=server.scheduler, max_model_len=server.max_model_len,
        cost=server.cost,
    )  # fmt: skip
    total = len(workload.requests)
    with TimeLeft() as progress:
        return simulation.run(
            workload.requests, on_done=lambda n: progress(n / total, f"{n:,}/{total:,} requests")
        )


def _result(
    server: _Server, workload: SimWorkload, run: SimulationRun, targets: ServeTargets | None, *, trace: Path,
    rate_factor: float, details: bool = False,
) -> dict[str, Any]:  # fmt: skip
    from kvtune.sim import run_report

    return {
        "mode": "serve",
        "backend": "simulated",
        "model_id": server.source.name,
        "workload": str(trace),
        "rate_factor": rate_factor,
        "num_requests": len(workload.requests) + len(workload.rejected),
        "num_rejected": len(workload.rejected),
        "notes": [*server.notes, *workload.notes],
        "server": {
            "cache": server.cache.to_dict(),
            "scheduler": server.scheduler.to_dict(),
            "max_model_len": server.max_model_len,
            "num_blocks": run.num_blocks,
        },
        **run_report(run, server.cost, targets=targets, details=details),
    }


def _calibrate(folder: Path, *, recipe: Path | None, seconds: float, out: Path) -> dict[str, Any]:
    from kvtune.errors import MissingExtraError

    try:
        from kvtune.engine.calibrate import calibrate
        from kvtune.engine.engine import Engine
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvtune"):
            raise
        raise MissingExtraError("measuring the engine", "engine") from None
    from kvtune.cli.progress import TimeLeft
    from kvtune.recipe import write_atomically
    from kvtune.sim import load_calibration

    if not out.parent.is_dir():
        raise UsageError(f"cannot write --out {out}: no such folder")
    engine = Engine.from_pretrained(folder) if recipe is None else Engine.from_recipe(recipe, folder)
    with engine, TimeLeft() as progress:
        measured = calibrate(
            engine, seconds=seconds, on_progress=lambda share: progress(share, "measuring steps")
        )
    write_atomically(out, json.dumps(measured.to_dict(), allow_nan=False) + "\n")
    return {"calibration": str(out), **load_calibration(out).to_dict()}


# -- output


def _calibrated_text(facts: dict[str, Any]) -> str:
    error = facts["fit_error"]
    return (
        f"{facts['num_measured_steps']:,} steps measured; on {error['num_shapes']} batch shapes kept out of "
        f"the fit, predicted step times are off by {error['mean_absolute']:.1%} on average\n"
        f"wrote {facts['calibration']}: give it to `kvtune simulate TRACE --mode serve --calibration`"
    )


def _as_text(result: dict[str, Any]) -> str:
    used, over = result["utilisation"], result["overload"]
    ended = f"{result['completed']:,} completed, {result['failed']:,} failed in {result['duration']:,.1f} s"
    rate = f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:,.1f} tokens/s"
    lines = [
        f"{result['model_id']}, simulated ({result['cost_model']['source']} step times)",
        *(f"  {note}" for note in result["notes"]),
        f"requests   {ended}",
        f"rate       {rate}",
    ]
    for name, label in (
        ("ttft", "TTFT"),
        ("tpot", "TPOT"),
        ("itl", "ITL"),
        ("e2el", "E2EL"),
        ("queue", "queueing"),
    ):
        figures = [result[f"{stem}_{name}_ms"] for stem in ("mean", "median", "p95", "p99")]
        if figures[0] is not None:
            mean, median, p95, p99 = figures
            lines.append(
                f"{label:<10} mean {mean:,.2f} ms, median {median:,.2f}, p95 {p95:,.2f}, p99 {p99:,.2f}"
            )
    lines += [
        f"cache      {result['token_hit_rate']:.1%} of prompt tokens hit, "
        f"{result['evicted_blocks']:,} blocks evicted",
        f"preempted  {result['preemptions']:,} times, {result['recomputed_tokens']:,} tokens computed again",
        f"busy       {used['busy']:.1%} of the time, {used['running_mean']:.1f} running on average, KV "
        f"{used['kv_referenced_mean']:.1%} in use (peak {used['kv_referenced_peak']:.1%})",
    ]
    if result["slo"] is not None:
        slo = result["slo"]
        lines.append(
            f"SLO        met by {slo['attainment']:.1%}, goodput {slo['request_goodput']:.2f} requests/s"
        )
    if over["longest_queueing_s"] > 0:
        state = "never caught up" if over["is_sustained"] else f"longest {over['longest_queueing_s']:,.1f} s"
        lines.append(
            f"queueing   {over['queueing_share_of_time']:.1%} of the time, {state}, up to "
            f"{over['waiting_peak']:,.0f} waiting"
        )
    from kvtune.report.terminal import timeline_lines

    course = timeline_lines(result)
    lines += ["course", *course] if course else []
    return "\n".join(lines)
