"""`kvtune tune`: find the smallest KV cache that passes the quality gate on your own requests."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.options import HighValue, Judge
from kvtune.cli.screen import say
from kvtune.cli.tune_input import (
    VLLM_TOP,
    materialised,
    open_target,
    read_workload,
    token_reader,
    tuned_model,
    workload_facts,
)
from kvtune.cli.tune_text import TuneProgress, tune_text
from kvtune.config import MAX_SEED, EngineConfig, parse_bytes, parse_duration
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.recipe import Recipe

__all__ = ["tune"]

DEFAULT_BUDGET, DEMO_BUDGET = "10m", "5m"
DEMO_PROBE_MARGIN = 0.05
"""What the demo's five minutes can prove of right-or-wrong answers."""


def tune(
    model: Annotated[
        Path | None, typer.Argument(help="Model folder (config.json, safetensors).", show_default=False)
    ] = None,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="Your requests: ShareGPT, OpenAI chat JSONL, a trace.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Tune the bundled reference model on generated chats.")
    ] = False,
    engine: Annotated[str, typer.Option(help="kvtune | vllm")] = "kvtune",
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="Python that has vLLM; default the vllm on PATH.")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Latency targets, for example ttft_p95=300ms,tpot_p95=50ms.")
    ] = None,
    kv_budget: Annotated[str, typer.Option(help="Memory for KV blocks.")] = "1GiB",
    budget: Annotated[
        str | None, typer.Option(help=f"Wall clock for tuning; default {DEFAULT_BUDGET}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default kvtune-out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted study in --out.")] = False,
    margin: Annotated[
        str, typer.Option(help="What counts as harm: near-lossless | balanced | aggressive.")
    ] = "near-lossless",
    per_layer: Annotated[
        bool | None,
        typer.Option(
            "--per-layer/--no-per-layer",
            help="Also search codecs layer by layer (kvtune's engine); default yes, with --squeeze no: they "
            "would spend the margin that planes need.",
            show_default=False,
        ),
    ] = None,
    squeeze: Annotated[
        bool,
        typer.Option(
            "--squeeze",
            help="Store sides of 8 bits in two planes, and prove which may be read from one while memory is "
            "short (kvtune's engine).",
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0, help="What this machine costs: the report then tells cost per token."),
    ] = None,
    high_value: HighValue = None,
    judge: Judge = None,
    trace_block_size: Annotated[
        int | None, typer.Option(help="Prompt tokens per hash id of a trace.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Shrink a trace's recorded lengths by this factor.")] = 1.0,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence in tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16")] = "auto",
    num_requests: Annotated[int | None, typer.Option(min=1, help="Use the first so many requests.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of kvtune's engine; default torch's, 1 for --demo.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of split, search and statistics.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> int:
    """Find the smallest KV cache that serves your requests without hurting the answers, and prove it."""
    from kvtune.cli.gate_questions import gate_questions
    from kvtune.quality import ReplaySettings, load_checker, margin_named
    from kvtune.recipe import write_atomically
    from kvtune.report import render, render_markdown
    from kvtune.tune import TuneSettings, check_output, parse_slo, run

    folder = out or Path("kvtune-demo" if demo else "kvtune-out")
    per_layer = not squeeze if per_layer is None else per_layer
    if demo and threads is None:
        threads = 1  # the model is small, and one thread is not stalled by whatever else this machine does
    # With equal row counts, products in float32 on one thread give a row the same bits in any batch: what is
    # recorded here is reproduced token for token by whoever runs the recipe.
    pad_rows = 16 if dtype == "float32" else 0
    settings = TuneSettings(
        budget_s=parse_duration((DEMO_BUDGET if demo else DEFAULT_BUDGET) if budget is None else budget),
        margin=margin_named(margin).name, probe_margin=DEMO_PROBE_MARGIN if demo else None,
        slo=None if slo is None else parse_slo(slo),
        kv_budget_bytes=parse_bytes(kv_budget), seed=seed, resume=resume, per_layer=per_layer,
        squeeze=squeeze, price_per_hour=price_per_hour,
        engine={"dtype": dtype, "max_model_len": max_model_len, "num_threads": threads, "pad_rows": pad_rows},
        replay=ReplaySettings() if engine == "kvtune" else ReplaySettings(num_decode=0, max_top=VLLM_TOP),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    config = EngineConfig(dtype=dtype, max_model_len=max_model_len, num_threads=threads, pad_rows=pad_rows)
    if judge is not None:
        load_checker(judge)  # a typing error should not wait for a model to load
    model_path = tuned_model(model, demo=demo)
    if not resume and not (demo and out is None) and (folder / "result.json").exists():
        raise UsageError(f"{folder} holds a finished run; give another --out, or delete it first")
    check_output(folder, resume=resume)
    requests = read_workload(workload, demo=demo, seed=seed, block_size=trace_block_size, limit=num_requests)
    if squeeze and engine != "kvtune":
        raise UsageError(f"--squeeze needs kvtune's own engine, {engine} cannot read one plane of two")
    target, vocab_size, length = open_target(engine, model_path, config, vllm_python, nested=squeeze)
    tokens = materialised(requests, model_path, vocab_size, length, scale=scale, seed=seed)
    settings = replace(
        settings, is_synthetic_text=tokens.is_synthetic_text, workload=workload_facts(requests, tokens),
        command=_command(model, workload, demo=demo, engine=engine, budget=budget, kv_budget=kv_budget,
                         out=out, slo=slo, margin=margin, dtype=dtype, seed=seed, scale=scale,
                         max_model_len=max_model_len, num_requests=num_requests, vllm_python=vllm_python,
                         trace_block_size=trace_block_size, threads=threads, high_value=high_value,
                         judge=judge, per_layer=per_layer, squeeze=squeeze,
                         price_per_hour=price_per_hour),
        questions=gate_questions(requests, tokens, model_path, max_model_len=length, seed=seed,
                                 high_value=high_value, judge=judge),
        text=token_reader(model_path), emit=_emitted,
    )  # fmt: skip
    with TuneProgress(settings) as progress:
        try:
            result = run(target, tokens.requests, settings, folder, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(folder, settings.command)) from None
    write_atomically(folder / "report.html", render(result.record))
    write_atomically(folder / "report.md", render_markdown(result.record))
    if as_json:
        print(json.dumps(result.record, allow_nan=False))
    else:
        say(tune_text(result.record, folder))
    return 0


def _emitted(recipe: Recipe, path: Path) -> dict[str, Any]:
    from kvtune.adapters.emit import emit_recipe

    target = "vllm" if recipe.engine["name"] == "vllm" else "transformers"
    try:
        return {"target": target, "text": emit_recipe(recipe, path, target).text}
    except UsageError as error:
        return {"target": target, "refusal": str(error)}


def _interrupted(folder: Path, command: str) -> str:
    """What to type next; before the study began there is nothing to continue."""
    from kvtune.tune import has_study

    return f"interrupted; continue with: {command} --resume" if has_study(folder) else "interrupted"


def _command(model: Path | None, workload: Path | None, *, demo: bool, **flags: Any) -> str:
    """The command that repeats this run: what differs from the defaults."""
    defaults = {"engine": "kvtune", "kv_budget": "1GiB", "margin": "near-lossless", "dtype": "auto",
                "seed": 0, "scale": 1.0, "per_layer": not flags["squeeze"], "squeeze": False}  # fmt: skip
    words = ["kvtune", "tune", *([] if model is None else [str(model)]), *(["--demo"] if demo else [])]
    for name, value in {"workload": workload, **flags}.items():
        flag = name.replace("_", "-")
        if value is None or value == defaults.get(name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
