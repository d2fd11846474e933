"""`kvtune plan`: what a model's KV cache costs, exactly, and how much of it a GPU holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtune.cli.options import Html
from kvtune.cli.screen import say


def plan(
    model: Annotated[str, typer.Argument(help="A config.json, its folder, or a bundled model id.")],
    context: Annotated[str, typer.Option(help="Context lengths in tokens, comma-separated.")] = "8192,131072",
    kv_dtype: Annotated[
        str,
        typer.Option(help="auto (the checkpoint's), bf16, fp8, int8, int4, k8v4, int4_rh, n8_rh or nvfp4."),
    ] = "auto",
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per block; default the engine's own: 16, sglang 1, trtllm 32.")
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    engine: Annotated[str, typer.Option(help="Whose allocator: kvtune, vllm, sglang or trtllm.")] = "kvtune",
    gpu: Annotated[str | None, typer.Option(help="Capacity of this GPU only, e.g. H100-80GB.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a card that has no name here, e.g. 48GiB.")
    ] = None,
    kv_budget: Annotated[
        str | None, typer.Option(help="Memory for KV over all cards, instead of an engine's own rule.")
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option(help="The engine's memory fraction; default its own.")
    ] = None,
    overhead: Annotated[
        str | None, typer.Option(help="Memory per card beside weights and KV, as measured.")
    ] = None,
    weights_bytes: Annotated[
        str | None, typer.Option(help="Size of the weights, e.g. 15GiB, where it cannot be told.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences run at once; default the engine's own.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens computed per step; default 512 for kvtune, else 8192.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Pick cards that hold so many sequences of the longest context."),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="CSV with columns gpu,price: pick the cheapest cards that hold it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Size of a host memory tier, e.g. 256GiB.")] = None,
    host_bandwidth: Annotated[str | None, typer.Option(help="Host to card, e.g. 25GB/s (assumed).")] = None,
    disk: Annotated[str | None, typer.Option(help="Size of a disk tier, e.g. 2TiB.")] = None,
    disk_bandwidth: Annotated[str | None, typer.Option(help="Disk to card, e.g. 3GB/s (assumed).")] = None,
    prefill_rate: Annotated[
        float | None, typer.Option(help="Measured prefill speed in tokens/s, to price recomputing.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Request file or trace: what its requests take and what changes win.")
    ] = None,
    trace_block_size: Annotated[
        int | None, typer.Option(help="Prompt tokens per hash id, for traces that do not determine it.")
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(help="Changes to try on the trace: cap=8192,truncate=4096,route=16384,codec=int8."),
    ] = None,
    html: Html = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the formulas with the numbers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Size a model's KV cache exactly: bytes per token and layer kind, at contexts, and what GPUs hold."""
    from kvtune.errors import UsageError
    from kvtune.plan import PlanRequest, contexts_from_text, find_model, plan_model, read_prices

    if what_if is not None and trace is None:
        raise UsageError("--what-if changes the requests of a trace: add --trace FILE")
    request = PlanRequest(
        contexts=contexts_from_text(context),
        kv_dtype=kv_dtype,
        block_size=block_size,
        tp=tp,
        engine=engine,
        gpu=gpu,
        gpu_memory=_bytes(gpu_memory),
        kv_budget=_bytes(kv_budget),
        memory_fraction=memory_fraction,
        overhead=_bytes(overhead),
        weights_bytes=_bytes(weights_bytes),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        concurrency=concurrency,
    )
    source = find_model(model)
    tiers = _tiers({"host": (host, host_bandwidth), "disk": (disk, disk_bandwidth)})
    result = plan_model(
        source,
        request,
        prices=None if prices is None else read_prices(prices),
        tiers=tiers,
        prefill_rate=prefill_rate,
    )
    out = result.to_dict(explain=explain)
    on_trace = None
    if trace is not None:
        from kvtune.cli.progress import TimeLeft
        from kvtune.plan import changes_from_text, plan_trace, size_model

        budget = result.capacity[0].kv_budget_bytes if len(result.capacity) == 1 else None
        changes = None if what_if is None else changes_from_text(what_if)
        workload, sizing = _workload(trace, trace_block_size), size_model(source, request)
        with TimeLeft() as progress:
            on_trace = plan_trace(
                workload, sizing, request, budget=budget, changes=changes, tiers=tiers, progress=progress
            )
        out["trace"] = on_trace.to_dict()
        if html is not None:
            from kvtune.cli.plan_page import trace_pictures

            out["trace"] |= trace_pictures(workload, sizing, budget)
    if html is not None:
        _write_page(html, out)
    if as_json:
        print(json.dumps(out))
        return
    from kvtune.cli.plan_text import plan_lines

    say("\n".join(plan_lines(result, on_trace, explain=explain)))


def _bytes(text: str | None) -> int | None:
    from kvtune.config import parse_bytes

    return None if text is None else parse_bytes(text)


def _tiers(given: dict[str, tuple[str | None, str | None]]) -> list[Any]:
    from kvtune.errors import UsageError
    from kvtune.plan import TierRequest

    tiers: list[TierRequest] = []
    for name, (size, bandwidth) in given.items():
        if size is None:
            if bandwidth is not None:
                raise UsageError(f"--{name}-bandwidth needs the size of the tier: --{name} 256GiB")
            continue
        rate = None if bandwidth is None else _bytes(bandwidth.strip().removesuffix("/s"))
        tiers.append(TierRequest(name=name, size=_bytes(size) or 0, bandwidth=rate))
    return tiers


def _workload(path: Path, block_size: int | None) -> Any:
    from kvtune.cli.progress import TimeLeft
    from kvtune.workload import load_workload

    with TimeLeft() as progress:
        return load_workload(
            path,
            trace_block_size=block_size,
            progress=lambda share: progress(share, f"reading {path.name}"),
        )


def _write_page(path: Path, out: dict[str, Any]) -> None:
    from kvtune.recipe import write_atomically
    from kvtune.report import render_plan

    write_atomically(path, render_plan(out))
