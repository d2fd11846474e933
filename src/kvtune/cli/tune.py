"""`kvtune tune`: find the smallest KV cache that passes the quality gate on your own requests."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.options import HighValue, Judge
from kvtune.cli.screen import say
from kvtune.config import (
    MAX_SEED,
    EngineConfig,
    format_bytes,
    format_layer_codecs,
    parse_bytes,
    parse_duration,
)
from kvtune.errors import UsageError
from kvtune.printable import one_line

if TYPE_CHECKING:
    from kvtune.recipe import Recipe
    from kvtune.target import Target
    from kvtune.tune import ProgressEvent, TuneSettings
    from kvtune.workload import Materialised, Workload

__all__ = ["materialised", "open_target", "read_workload", "tune"]

DEFAULT_BUDGET, DEMO_BUDGET = "10m", "5m"
DEMO_REQUESTS = 720
DEMO_PROBE_MARGIN = 0.05
"""What the demo's five minutes can prove of right-or-wrong answers."""
MAX_REJECTED = 50
"""Rejected requests that a record names; it counts all."""
VLLM_TOP = 128
"""Ids per token asked of a vLLM server: its answers travel as JSON text."""


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
        bool, typer.Option(help="Also search codecs layer by layer (kvtune's engine).")
    ] = True,
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
    model_path = _model_path(model, demo=demo)
    if not resume and not (demo and out is None) and (folder / "result.json").exists():
        raise UsageError(f"{folder} holds a finished run; give another --out, or delete it first")
    check_output(folder, resume=resume)
    requests = read_workload(workload, demo=demo, seed=seed, block_size=trace_block_size, limit=num_requests)
    if squeeze and engine != "kvtune":
        raise UsageError(f"--squeeze needs kvtune's own engine, {engine} cannot read one plane of two")
    target, vocab_size, length = open_target(engine, model_path, config, vllm_python, nested=squeeze)
    tokens = materialised(requests, model_path, vocab_size, length, scale=scale, seed=seed)
    settings = replace(
        settings, is_synthetic_text=tokens.is_synthetic_text, workload=_facts(requests, tokens),
        command=_command(model, workload, demo=demo, engine=engine, budget=budget, kv_budget=kv_budget,
                         out=out, slo=slo, margin=margin, dtype=dtype, seed=seed, scale=scale,
                         max_model_len=max_model_len, num_requests=num_requests, vllm_python=vllm_python,
                         trace_block_size=trace_block_size, threads=threads, high_value=high_value,
                         judge=judge, per_layer=per_layer, squeeze=squeeze or None,
                         price_per_hour=price_per_hour),
        questions=gate_questions(requests, tokens, model_path, max_model_len=length, seed=seed,
                                 high_value=high_value, judge=judge),
        text=_reader(model_path), emit=_emitted,
    )  # fmt: skip
    with _Progress(settings) as progress:
        try:
            result = run(target, tokens.requests, settings, folder, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(folder, settings.command)) from None
    write_atomically(folder / "report.html", render(result.record))
    write_atomically(folder / "report.md", render_markdown(result.record))
    if as_json:
        print(json.dumps(result.record, allow_nan=False))
    else:
        say(_as_text(result.record, folder))
    return 0


# -- what is tuned --


def _model_path(model: Path | None, *, demo: bool) -> Path:
    if demo:
        if model is not None:
            raise UsageError("--demo brings its own model; leave MODEL out")
        from kvtune.testing.reference import reference_model_path

        return reference_model_path()
    if model is None:
        raise UsageError("which model? give a model folder, or --demo")
    if not model.is_dir():
        raise UsageError(f"model folder {model} not found; give the folder that holds config.json")
    return model


def read_workload(
    file: Path | None, *, demo: bool, seed: int, block_size: int | None, limit: int | None
) -> Workload:
    from kvtune.workload import demo_chat, load_workload

    if file is not None:
        return load_workload(file, trace_block_size=block_size, limit=limit)
    if demo:
        return demo_chat(limit or DEMO_REQUESTS, seed=seed, max_chars=4000)
    raise UsageError("which traffic? give --workload FILE with your requests, or --demo")


def open_target(
    engine: str, model: Path, config: EngineConfig, vllm_python: Path | None, *, nested: bool = False
) -> tuple[Target, int, int]:
    """The engine to measure, the model's vocabulary size and the longest sequence in tokens. `nested`: of
    codecs of 8 bits our engine offers the one of two planes alone."""
    if engine == "kvtune":
        own = _own_target(model, config, nested=nested)
        return own, own.loaded.vocab_size, config.max_model_len or own.loaded.max_model_len
    if engine == "vllm":
        from kvtune.adapters.vllm_server import VLLMTarget

        server = VLLMTarget(model, python=vllm_python, dtype=config.dtype, max_model_len=config.max_model_len)
        return server, server.vocab_size, server.max_model_len - 1  # scoring generates one more token
    raise UsageError(f"unknown engine {engine!r}; known: kvtune, vllm")


def _own_target(model: Path, config: EngineConfig, *, nested: bool) -> Any:
    from kvtune.errors import MissingExtraError

    try:
        from kvtune.engine.target import EngineTarget
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvtune"):
            raise
        raise MissingExtraError("the kvtune engine", "engine") from None
    return EngineTarget(model, config=config, nested=nested)


def materialised(
    workload: Workload, model: Path, vocab_size: int, max_model_len: int, *, scale: float, seed: int
) -> Materialised:
    from kvtune.adapters.prompt_encoder import prompt_encoder
    from kvtune.workload import materialise

    needs_text = any(request.has_text for request in workload.requests)
    tokens = materialise(
        workload, vocab_size=vocab_size, max_model_len=max_model_len, scale=scale, seed=seed,
        encode=prompt_encoder(model) if needs_text else None,
    )  # fmt: skip
    for note in (*workload.notes, *tokens.notes):
        say(f"kvtune: {note}", is_aside=True)
    return tokens


def _facts(workload: Workload, tokens: Materialised) -> dict[str, Any]:
    """What the recipe says about the traffic it was proven on. `prompts_sha256`: of the token ids as sent."""
    from kvtune.workload import workload_profile

    digest = hashlib.sha256()
    for request in tokens.requests:
        digest.update(f"{request.max_tokens}:{request.prompt_token_ids}\n".encode())
    return {
        "path": None if workload.path is None else str(workload.path), "format": workload.format,
        "sha256": workload.sha256, "prompts_sha256": digest.hexdigest(), "scale": tokens.scale,
        "num_rejected": len(tokens.rejected), "notes": [*workload.notes, *tokens.notes],
        "block_size": workload.block_size, "profile": workload_profile(workload),
        "cases": _cases(workload, tokens),
        "rejected": [
            {"request_id": r.request_id, "reason": r.reason} for r in tokens.rejected[:MAX_REJECTED]
        ],
    }  # fmt: skip


def _cases(workload: Workload, tokens: Materialised) -> dict[str, dict[str, int]]:
    """Requests asked and rejected by their tag `case`; untagged ones under "untagged"."""
    rejected = {r.request_id for r in tokens.rejected}
    cases: dict[str, dict[str, int]] = {}
    for request in workload.requests:
        counts = cases.setdefault(
            request.tags.get("case", "untagged"), {"num_requests": 0, "num_rejected": 0}
        )
        counts["num_requests"] += 1
        counts["num_rejected"] += request.request_id in rejected
    return cases


def _reader(model: Path) -> Callable[[Sequence[int]], str] | None:
    """Token ids to text with the marks of turns and ends, which tell whose words they are; None without a
    tokenizer."""
    from kvtune.adapters.prompt_encoder import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        return None
    return lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=False))


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
                "seed": 0, "scale": 1.0, "per_layer": True}  # fmt: skip
    words = ["kvtune", "tune", *([] if model is None else [str(model)]), *(["--demo"] if demo else [])]
    for name, value in {"workload": workload, **flags}.items():
        if value is False:
            words.append(f"--no-{name.replace('_', '-')}")
        elif value is True and name not in defaults:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


# -- what is shown --


class _Progress:
    """Stage and time left on stderr: a live line on a terminal, one line per trial elsewhere."""

    def __init__(self, settings: TuneSettings) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        text = f"tuning, at most {settings.budget_s:.0f} s"
        self._status = self._console.status(text) if self._console.is_terminal else None

    def __enter__(self) -> _Progress:
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


def _as_text(record: Mapping[str, Any], folder: Path) -> str:
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
