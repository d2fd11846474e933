"""What `kvtune plan` prints: small tables, then what to mind and what is assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kvtune.cli.table import text_table
from kvtune.config import format_bytes
from kvtune.plan import CapacityRow, Finding, Plan

if TYPE_CHECKING:
    from kvtune.plan import Holding, TracePlan, WhatIf

__all__ = ["plan_lines"]

_BINDS = {
    "weights": "weights do not fit", "kv_memory": "KV memory", "max_num_seqs": "max_num_seqs",
    "model_length": "model length",
}  # fmt: skip
_MOST_PICKS = 12


def plan_lines(plan: Plan, trace: TracePlan | None, *, explain: bool) -> Iterator[str]:
    """All lines, in the order a reader needs them."""
    storage = (
        plan.k_storage if plan.k_storage == plan.v_storage else f"K {plan.k_storage}, V {plan.v_storage}"
    )
    blocks = f"blocks of {plan.block_size}"
    if plan.effective_block_size != plan.block_size:
        blocks += f" (up to {plan.effective_block_size:,})"
    yield f"{plan.model}: {plan.engine}, {storage}, {blocks}, TP {plan.tp}"
    fixed = format_bytes(plan.fixed_bytes_per_sequence)
    yield f"{plan.growth_bytes_per_token:,} B per token + {fixed} per sequence (logical)"
    yield from _section("layers", _layers(plan))
    yield from _section("one sequence", _contexts(plan))
    if plan.capacity:
        yield from _section("at once", _capacity(plan))
    if plan.picks:
        yield from _section("cards that hold it, fewest of each", _picks(plan))
    for lines in _tiers(plan):
        yield from lines
    if trace is not None:
        yield from _trace(trace)
    findings = [*plan.findings, *(trace.findings if trace else ())]
    if findings:
        yield from _section("mind", [f"  {_mark(finding)} {finding.message}" for finding in findings])
    if explain:
        yield from _section("formulas", [f"  {line}" for line in plan.formulas])
    yield ""
    for note in [*plan.assumptions, *(trace.notes if trace else ())]:
        yield f"- {note}"


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield ""
    yield title
    yield from lines


def _mark(finding: Finding) -> str:
    return "!" if finding.severity == "warning" else "-"


def _layers(plan: Plan) -> list[str]:
    head = ("kind", "layers", "KV heads", "dims K/V", "window", "B/token", "state")
    rows = [
        (
            str(row.kind),
            str(row.count),
            str(row.num_kv_heads) if row.num_kv_heads else "-",
            f"{row.k_head_dim}/{row.v_head_dim}" if row.num_kv_heads else "-",
            "-" if row.window is None else f"{row.window:,}",
            f"{row.bytes_per_token:,}" if row.bytes_per_token else "-",
            format_bytes(row.state_bytes) if row.state_bytes else "-",
        )
        for row in plan.layers
    ]
    return text_table(head, rows)


def _contexts(plan: Plan) -> list[str]:
    head = ("tokens", "logical", "allocator", "copies", "window slack", "rounding", "padding", "most of it")
    rows = [
        (
            f"{parts.num_tokens:,}",
            format_bytes(parts.logical_bytes),
            format_bytes(parts.allocator_bytes),
            *(
                format_bytes(size) if size else "-"
                for size in (
                    parts.replication_bytes,
                    parts.window_slack_bytes,
                    parts.rounding_bytes,
                    parts.padding_bytes,
                )
            ),
            _largest(plan, index),
        )
        for index, parts in enumerate(plan.at_context)
    ]
    return text_table(head, rows)


def _largest(plan: Plan, index: int) -> str:
    groups = plan.at_context[index].groups
    if not groups:
        return "-"
    largest = max(groups, key=lambda group: group.bytes)
    return f"{largest.kind} {largest.share:.0%}"


def _capacity(plan: Plan) -> list[str]:
    contexts = [str(parts.num_tokens) for parts in plan.at_context]
    head = ("cards", "KV budget", "longest", *(f"x {int(n):,}" for n in contexts), "bound by", "step floor")
    rows = [_capacity_cells(row, contexts) for row in plan.capacity if row.kv_budget_bytes]
    small = [row.gpu for row in plan.capacity if not row.kv_budget_bytes]
    lines = text_table(head, rows) if rows else []
    if small:
        lines.append(f"  too small for the weights: {', '.join(small)}")
    return lines


def _capacity_cells(row: CapacityRow, contexts: Sequence[str]) -> tuple[str, ...]:
    last = contexts[-1]
    floor = row.step_floor_s[last]
    return (
        f"{row.num_gpus} x {row.gpu}",
        format_bytes(row.kv_budget_bytes),
        "unbounded" if row.max_tokens is None else f"{row.max_tokens:,}",
        *(_count(row, n) for n in contexts),
        " / ".join(dict.fromkeys(_BINDS[row.binds[n]] for n in contexts)),
        "-" if floor is None else f"{1000 * floor:.0f} ms",
    )


def _count(row: CapacityRow, context: str) -> str:
    held, running = row.max_concurrency[context], row.running[context]
    return f"{held:,}" if held == running else f"{running:,} of {held:,}"


def _picks(plan: Plan) -> list[str]:
    has_prices = any(pick.price is not None for pick in plan.picks)
    head = ("cards", "memory", "KV budget", "held", *(("price", "per sequence") if has_prices else ()))
    rows: list[tuple[str, ...]] = []
    for pick in plan.picks[:_MOST_PICKS]:
        price = () if pick.price is None else (f"{pick.price:,.2f}", f"{pick.price_per_sequence or 0:.3g}")
        rows.append(
            (
                f"{pick.num_gpus} x {pick.gpu}",
                format_bytes(pick.memory_bytes),
                format_bytes(pick.kv_budget_bytes),
                f"{pick.held:,}",
                *price,
            )
        )
    more = len(plan.picks) - len(rows)
    return [*text_table(head, rows), *([f"  and {more} more (--json)"] if more > 0 else [])]


def _tiers(plan: Plan) -> Iterator[Iterator[str]]:
    for tier in plan.tiers:
        holds = "" if tier.tokens is None else f", {tier.tokens:,} tokens"
        rate = f"{tier.bandwidth / 1e9:g} GB/s ({tier.bandwidth_basis})"
        head = ("tokens", "bytes", "sequences", "load", "recompute", "faster", "even at")
        rows = [
            (
                f"{load.context:,}",
                format_bytes(load.stored_bytes),
                f"{load.sequences:,}",
                _seconds(load.load_s),
                "-" if load.recompute_s is None else _seconds(load.recompute_s),
                load.faster or "?",
                "-" if load.break_even_bandwidth is None else f"{load.break_even_bandwidth / 1e9:.2f} GB/s",
            )
            for load in tier.loads
        ]
        basis = plan.prefill_basis or "not known: name --gpu, or a measured --prefill-rate"
        title = f"{tier.name} tier of {format_bytes(tier.size_bytes)} at {rate}{holds}; recompute: {basis}"
        yield _section(title, text_table(head, rows))


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _trace(trace: TracePlan) -> Iterator[str]:
    lengths = trace.lengths
    unit = "tokens, estimated from text" if lengths.is_estimated else "tokens"
    quantiles = f"p50 {lengths.p50:,}, p90 {lengths.p90:,}, p99 {lengths.p99:,}, max {lengths.max:,} {unit}"
    lines = [
        f"  {lengths.num_requests:,} requests: {quantiles}",
        f"  {_held(trace.today)}",
        f"  {_reuse(trace)}",
        *(
            f"  full of prefixes, up to {level.name} ({format_bytes(level.size_bytes)}) hits "
            f"{level.token_hit_rate:.1%} of prompt tokens"
            for level in trace.levels
        ),
    ]
    yield from _section(f"trace {trace.path}", lines)
    head = (
        "what if",
        "touches",
        "tokens lost",
        "mean bytes",
        "expected",
        "guaranteed",
        "hits",
        "second pool",
    )
    yield from _section("changes", text_table(head, [_change(row) for row in trace.what_ifs]))


def _held(holding: Holding) -> str:
    mean, longest = format_bytes(holding.mean_bytes), format_bytes(holding.longest_bytes)
    text = f"{mean} each on average, the longest {longest}"
    if holding.expected is None:
        return f"{text}; name --gpu, --gpu-memory or --kv-budget for how many are held"
    return f"{text}: {holding.expected:,.1f} held on average, {holding.guaranteed:,} guaranteed"


def _reuse(trace: TracePlan) -> str:
    reuse = trace.reuse
    if reuse is None:
        return "prefix reuse: unknown, the trace holds lengths only"
    bound = "at least " if reuse.is_lower_bound else ""
    text = f"prefix reuse: {bound}{reuse.hit_rate:.1%} of prompt tokens in blocks of {reuse.block_size:,}"
    if reuse.engine_block_size != reuse.block_size:
        text += f", {reuse.engine_hit_rate:.1%} in the engine's of {reuse.engine_block_size:,}"
    return f"{text}; everything ever cached: {format_bytes(reuse.unique_bytes)}"


def _change(row: WhatIf) -> tuple[str, ...]:
    second = "-"
    if row.second is not None:
        second = f"{row.second.num_requests:,} requests, {row.second_memory_share:.0%} of memory"
    return (
        row.change,
        f"{row.touched_share:.1%}",
        f"{row.lost_tokens_share:.1%}" if row.lost_tokens_share else "-",
        format_bytes(row.main.mean_bytes),
        f"{row.gain_expected:.2f}x",
        f"{row.gain_guaranteed:.2f}x",
        "-" if row.hit_rate is None else f"{row.hit_rate:.1%}",
        second,
    )
