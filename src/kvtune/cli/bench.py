"""`kvtune bench`: latency and throughput of a server, or of a model in this process."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.screen import say
from kvtune.config import MAX_SEED
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.adapters.bench_result import BenchRecord
    from kvtune.adapters.openai_client import CompletionsClient, StreamRequest
    from kvtune.target import LoadRequest
    from kvtune.workload import Workload

__all__ = ["bench"]

DEFAULT_MAX_TOKENS = 128


def bench(
    workload: Annotated[
        Path, typer.Option("--workload", help="File of requests or a trace.", show_default=False)
    ],
    url: Annotated[str | None, typer.Option("--url", help="OpenAI-compatible server to measure.")] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Model folder: to run in process, or the server's tokenizer."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Run the model in process under this recipe.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Model the server is asked for; default its first.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token.")] = None,
    trace_block_size: Annotated[
        int | None, typer.Option(help="Prompt tokens per hash id, for traces that do not determine it.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first so many requests.")] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, inf: all at once. Default: the file's own times."),
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gaps; 1 is Poisson, below 1 burstier.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="At most so many requests at once.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cap on generated tokens per request.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Shrink a trace's recorded lengths by this factor.")] = 1.0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask the server to go on after the end token.")] = False,
    deadline: Annotated[str | None, typer.Option(help="Stop after this long, for example 5m.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of arrival times and synthetic tokens.")
    ] = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the result, with every request.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure latency and throughput of a server (--url) or of a model in process (--model, --recipe)."""
    from kvtune.adapters.bench_requests import first_model, text_request, token_request
    from kvtune.adapters.bench_result import summarise
    from kvtune.adapters.openai_client import CompletionsClient
    from kvtune.config import parse_duration
    from kvtune.workload import load_workload

    if url is None and model is None and recipe is None:
        raise UsageError("nothing to measure: give --url URL, --model DIR or --recipe FILE")
    if url is not None and recipe is not None:
        raise UsageError("--url measures a server as it runs; --recipe builds an engine in process: give one")
    deadline_s = None if deadline is None else parse_duration(deadline)
    if save is not None and (save.is_dir() or not os.access(save.parent, os.W_OK)):
        raise UsageError(f"cannot write --save {save}: give a file in a folder that exists and is writable")
    requests = _timed(
        load_workload(workload, trace_block_size=trace_block_size),
        num_prompts,
        request_rate,
        burstiness,
        seed,
    )
    if url is not None:
        client = CompletionsClient(url, api_key=api_key)
        served = model_name or first_model(client)
        common: dict[str, Any] = {"model": served, "temperature": 0.0}
        if ignore_eos:
            common["ignore_eos"] = True
        if model is None:
            wire = [text_request(request, common, max_tokens) for request in requests.requests]
        else:
            tokens = _tokens(requests, model, max_tokens=max_tokens, scale=scale, seed=seed)
            wire = [token_request(request, common) for request in tokens]
        records, duration_s = _measure_server(client, wire, deadline_s, max_concurrency)
        facts: dict[str, Any] = {"backend": "openai", "model_id": served, "base_url": client.base_url}
    else:
        if max_concurrency is not None:
            raise UsageError("--max-concurrency limits a client; in process, max_num_seqs of the recipe does")
        records, duration_s, facts = _measure_in_process(
            requests, model=model, recipe_path=recipe, max_tokens=max_tokens, scale=scale, seed=seed,
            deadline_s=deadline_s,
        )  # fmt: skip
    facts |= {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "workload": str(workload),
        "request_rate": "trace" if request_rate is None else _plain_rate(request_rate),
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
    }
    result = facts | summarise(records, duration_s)
    if save is not None:
        from kvtune.recipe import write_atomically

        detailed = facts | summarise(records, duration_s, details=True)
        write_atomically(save, json.dumps(detailed, allow_nan=False) + "\n")
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        say(_as_text(result))
    return 0 if result["completed"] else 3


def _timed(
    workload: Workload, num_prompts: int | None, rate: float | None, burstiness: float, seed: int
) -> Workload:
    """The first requests, at the asked rate."""
    import numpy as np

    from kvtune.adapters.bench_result import arrivals_at_rate

    if rate is not None and not rate > 0:
        raise UsageError(f"--request-rate must be above zero, found {rate}")
    if not 0 < burstiness < math.inf:
        raise UsageError(f"--burstiness must be above zero and finite, found {burstiness}")
    chosen = workload.requests[:num_prompts]
    if rate is not None:
        times = arrivals_at_rate(len(chosen), rate, burstiness=burstiness, rng=np.random.default_rng(seed))
        chosen = tuple(replace(r, arrival_s=at) for r, at in zip(chosen, times, strict=True))
    return replace(workload, requests=tuple(chosen))


# -- measuring --


def _measure_server(
    client: CompletionsClient,
    wire: list[StreamRequest],
    deadline_s: float | None,
    max_concurrency: int | None,
) -> tuple[list[BenchRecord], float]:
    from kvtune.adapters.bench_result import of_stream

    results, duration_s = client.stream_all(
        wire, deadline_s=deadline_s, max_concurrency=max_concurrency, on_done=_progress(len(wire))
    )
    return [of_stream(result) for result in results], duration_s


def _measure_in_process(
    workload: Workload, *, model: Path | None, recipe_path: Path | None, max_tokens: int | None, scale: float,
    seed: int, deadline_s: float | None,
) -> tuple[list[BenchRecord], float, dict[str, Any]]:  # fmt: skip
    from kvtune.adapters.bench_result import of_load
    from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
    from kvtune.recipe import Recipe

    recipe = None if recipe_path is None else Recipe.load(recipe_path)
    cache = CacheConfig() if recipe is None else recipe.cache_config()
    scheduler = SchedulerConfig() if recipe is None else recipe.scheduler_config()
    config = EngineConfig() if recipe is None else recipe.engine_config()
    folder = model or Path(str(recipe.model.get("path", "")) if recipe else "")
    target_class = _engine_target()
    target = target_class(folder, config=config, cache=cache, scheduler=scheduler)
    tokens = _tokens(
        workload, folder, max_tokens=max_tokens, scale=scale, seed=seed, max_len=config.max_model_len
    )
    with target.start({}, kv_budget_bytes=cache.kv_budget_bytes) as running:
        report = running.load(tokens, deadline_s=deadline_s, on_done=_progress(len(tokens)))
        effective = dict(running.effective)
    records = [of_load(result, request) for result, request in zip(report.results, tokens, strict=True)]
    return records, report.duration_s, {"backend": "kvtune", "model_id": str(folder), "effective": effective}


def _engine_target() -> Any:
    from kvtune.errors import MissingExtraError

    try:
        from kvtune.engine.target import EngineTarget
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvtune"):
            raise
        raise MissingExtraError("running a model in process", "engine") from None
    return EngineTarget


def _tokens(
    workload: Workload, folder: Path, *, max_tokens: int | None, scale: float, seed: int,
    max_len: int | None = None,
) -> list[LoadRequest]:  # fmt: skip
    """The workload as token ids; what the user should know goes to stderr."""
    from kvtune.adapters.bench_requests import load_requests

    requests, notes = load_requests(
        workload, folder, max_tokens=max_tokens, scale=scale, seed=seed, max_model_len=max_len
    )
    for note in notes:
        say(f"kvtune: {note}", is_aside=True)
    return requests


# -- output --


def _progress(total: int) -> Any:
    """Counts on stderr while it is a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} requests", end=end, file=sys.stderr, flush=True)

    return show


def _plain_rate(rate: float) -> float | str:
    """JSON has no infinity; vLLM writes the word."""
    return "inf" if math.isinf(rate) else rate


def _as_text(result: dict[str, Any]) -> str:
    ended = f"{result['completed']:,} completed, {result['failed']:,} failed in {result['duration']:.2f} s"
    tokens = f"{result['total_input_tokens']:,} in, {result['total_output_tokens']:,} out"
    if result["total_cached_tokens"] is not None:
        tokens += f", {result['total_cached_tokens']:,} cached"
    rate = f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:.1f} tokens/s"
    lines = [
        f"{result['backend']} {result['model_id']}",
        f"requests   {ended}",
        f"tokens     {tokens}",
        f"rate       {rate}",
    ]
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2EL")):
        figures = [result[f"{stem}_{name}_ms"] for stem in ("mean", "median", "p95", "p99")]
        if figures[0] is not None:
            mean, median, p95, p99 = figures
            lines.append(f"{label:<10} mean {mean:.2f} ms, median {median:.2f}, p95 {p95:.2f}, p99 {p99:.2f}")
    if result["incomplete_reason"] is not None:
        lines.append(f"first failure: {result['incomplete_reason']}")
    return "\n".join(lines)
