"""`kvtune plan`: what a model's KV cache costs, exactly, and how much of it a GPU holds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def plan(
    model: Annotated[str, typer.Argument(help="A config.json, its folder, or a bundled model id.")],
    context: Annotated[str, typer.Option(help="Context lengths in tokens, comma-separated.")] = "8192,131072",
    kv_dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), bf16, fp8, int8, int4, k8v4 or nvfp4.")
    ] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    engine: Annotated[str, typer.Option(help="Whose allocator: kvtune, vllm, sglang or trtllm.")] = "kvtune",
    gpu: Annotated[str | None, typer.Option(help="Capacity of this GPU only, e.g. H100-80GB.")] = None,
    weights_bytes: Annotated[
        str | None, typer.Option(help="Size of the weights, e.g. 15GiB, where it cannot be told.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Size a model's KV cache exactly: bytes per token and layer kind, at contexts, and what GPUs hold."""
    from kvtune.config import parse_bytes
    from kvtune.plan import PlanRequest, contexts_from_text, find_model, plan_model

    request = PlanRequest(
        contexts=contexts_from_text(context),
        kv_dtype=kv_dtype,
        block_size=block_size,
        tp=tp,
        engine=engine,
        gpu=gpu,
        weights_bytes=None if weights_bytes is None else parse_bytes(weights_bytes),
    )
    result = plan_model(find_model(model), request)
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)


def _show(plan: dict[str, Any]) -> None:
    """Three small tables and what they assume."""
    from rich.console import Console

    from kvtune.config import format_bytes

    console = Console(highlight=False, markup=False)
    kv = plan["kv"]
    k, v = kv["k_storage"], kv["v_storage"]
    storage = k if k == v else f"K {k}, V {v}"
    console.print(
        f"{plan['model']}: {plan['engine']}, {storage}, blocks of {plan['block_size']}, TP {plan['tp']}",
        style="bold",
    )
    console.print(
        f"{kv['growth_bytes_per_token']:,} B per token + "
        f"{format_bytes(kv['fixed_bytes_per_sequence'])} per sequence (logical)"
    )
    console.print(_layers_table(kv["layers"]))
    console.print(_context_table(plan))
    if plan["capacity"]:
        console.print(_capacity_table(plan))
        small = [row["gpu"] for row in plan["capacity"] if not row["kv_budget_bytes"]]
        if small:
            console.print(f" too small for the weights alone: {', '.join(small)}")
    for note in plan["assumptions"]:
        console.print(f"- {note}", style="dim")


def _layers_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from kvtune.config import format_bytes

    table = Table("layers", "kind", "KV heads", "dims K/V", "window", "B/token", "state", box=None)
    for row in rows:
        has_heads = row["num_kv_heads"] > 0
        table.add_row(
            str(row["count"]),
            row["kind"],
            str(row["num_kv_heads"]) if has_heads else "-",
            f"{row['k_head_dim']}/{row['v_head_dim']}" if has_heads else "-",
            "-" if row["window"] is None else f"{row['window']:,}",
            f"{row['bytes_per_token']:,}" if row["bytes_per_token"] else "-",
            format_bytes(row["state_bytes"]) if row["state_bytes"] else "-",
        )
    return table


def _context_table(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    from kvtune.config import format_bytes

    table = Table("context", "logical", "allocator", box=None)
    for context, sizes in plan["at_context"].items():
        table.add_row(
            f"{int(context):,}", format_bytes(sizes["logical_bytes"]), format_bytes(sizes["allocator_bytes"])
        )
    return table


def _capacity_table(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    from kvtune.config import format_bytes

    contexts = list(plan["at_context"])
    heads = [f"{int(context):,} at once" for context in contexts]
    table = Table("GPU", "KV budget", "longest sequence", *heads, box=None)
    for row in plan["capacity"]:
        if not row["kv_budget_bytes"]:
            continue
        longest = "unbounded" if row["max_tokens"] is None else f"{row['max_tokens']:,} tokens"
        table.add_row(
            f"{row['num_gpus']} x {row['gpu']}",
            format_bytes(row["kv_budget_bytes"]),
            longest,
            *(f"{row['max_concurrency'][context]:,}" for context in contexts),
        )
    return table
