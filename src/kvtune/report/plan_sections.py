"""What a page says of a plan: bytes by layer and context, what cards hold, and what a trace would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvtune.report.blocks import (
    Block,
    Cell,
    Code,
    Facts,
    Interval,
    Intervals,
    Paragraph,
    Section,
    Table,
    Tone,
    cell,
)
from kvtune.report.record import as_mapping, as_sequence, find, number, show_number
from kvtune.report.workload_sections import rate_cell, rate_text

__all__ = ["findings_section", "plan_answer", "plan_sections", "trace_plan_sections"]

_SEVERITIES: Final[Mapping[str, Tone]] = {"warning": "warn", "error": "bad"}
_BINDS: Final = {
    "weights": "weights do not fit", "kv_memory": "KV memory", "max_num_seqs": "max_num_seqs",
    "model_length": "model length",
}  # fmt: skip
_MOST_CARDS: Final = 24


def plan_answer(plan: Mapping[str, Any]) -> Section:
    """Bytes per token, per sequence, and what the first card holds."""
    cards: list[tuple[str, Cell]] = [
        ("KV bytes per token", cell(find(plan, "kv.growth_bytes_per_token"), "bytes", test_id="growth")),
        ("KV bytes per sequence", cell(find(plan, "kv.fixed_bytes_per_sequence"), "bytes", test_id="fixed")),
    ]
    capacity = [as_mapping(row) for row in as_sequence(plan.get("capacity"))]
    if len(capacity) == 1:  # one card was named, so it is what the reader asked about
        row = capacity[0]
        name = f"{row.get('num_gpus', 1)} x {row.get('gpu')}"
        cards.append((f"KV budget, {name}", cell(row.get("kv_budget_bytes"), "bytes", test_id="kv_budget")))
        cards.append(("longest sequence, tokens", cell(row.get("max_tokens"), test_id="max_tokens")))
        for context, held in as_mapping(row.get("max_concurrency")).items():
            cards.append((f"held at {_tokens(context)}", cell(held, test_id=f"held.{context}")))
    expected = find(plan, "trace.today.expected")
    if expected is not None:
        cards.append(("held of this trace, mean", cell(expected, test_id="trace.expected")))
    return Section("Answer", (Paragraph(_sentence(plan, capacity)), Facts(tuple(cards), is_headline=True)))


def _sentence(plan: Mapping[str, Any], capacity: Sequence[Mapping[str, Any]]) -> str:
    growth = show_number(number(find(plan, "kv.growth_bytes_per_token")) or 0, "bytes")
    text = f"One token costs {growth} in {plan.get('engine')}, blocks of {plan.get('block_size')}."
    for row in capacity if len(capacity) == 1 else ():
        held = as_mapping(row.get("max_concurrency"))
        for context, count in list(held.items())[:1]:
            card = f"{row.get('num_gpus', 1)} x {row.get('gpu')}"
            text += f" {card} holds {number(count) or 0:,.0f} sequences of {_tokens(context)}."
    return text


def plan_sections(plan: Mapping[str, Any]) -> list[Section]:
    """Everything about the model and the cards."""
    sections = [Section("One sequence", (_context_table(plan), _layer_table(plan)))]
    capacity = [as_mapping(row) for row in as_sequence(plan.get("capacity"))]
    if capacity:
        sections.append(Section("Cards", (_capacity_table(capacity), *_budgets(capacity))))
    picks = [as_mapping(row) for row in as_sequence(plan.get("picks"))]
    if picks:
        sections.append(Section("Cards that hold it", (_pick_table(picks),)))
    tiers = [as_mapping(row) for row in as_sequence(plan.get("tiers"))]
    if tiers:
        tables: list[Block] = [_tier_table(tier) for tier in tiers]
        tables.append(Paragraph(f"Recomputing: {plan.get('prefill_basis') or 'speed not known'}."))
        sections.append(Section("Host and disk tiers", tuple(tables)))
    formulas = [str(line) for line in as_sequence(plan.get("explain"))]
    if formulas:
        sections.append(Section("Formulas", (Code("\n".join(formulas), "formulas"),)))
    return sections


def trace_plan_sections(trace: Mapping[str, Any]) -> list[Section]:
    """What the requests of a trace take, and what changes would win."""
    if not trace:
        return []
    changes = [as_mapping(row) for row in as_sequence(trace.get("what_ifs"))]
    blocks: list[Block] = [_trace_facts(trace)]
    if changes:
        blocks += [_gain_figure(changes), _change_table(changes)]
    return [Section("What if", tuple(blocks))]


def findings_section(plan: Mapping[str, Any]) -> Section | None:
    """What to mind, warnings first."""
    found = [*as_sequence(plan.get("findings")), *as_sequence(find(plan, "trace.findings"))]
    rows = [as_mapping(row) for row in found]
    if not rows:
        return None
    ordered = sorted(rows, key=lambda row: str(row.get("severity")) not in _SEVERITIES)
    return Section(
        "To mind",
        tuple(
            Paragraph(str(row.get("message")), _SEVERITIES.get(str(row.get("severity")), ""))
            for row in ordered
        ),
    )


def _tokens(value: Any) -> str:
    count = number(
        value if isinstance(value, int | float) else int(str(value)) if str(value).isdigit() else None
    )
    return str(value) if count is None else f"{count:,.0f} tokens"


def _context_table(plan: Mapping[str, Any]) -> Table:
    keys = ("replication_bytes", "window_slack_bytes", "rounding_bytes", "padding_bytes")
    rows = tuple(
        (
            Cell(_tokens(context)),
            cell(parts.get("logical_bytes"), "bytes", test_id=f"context.{context}.logical_bytes"),
            cell(parts.get("allocator_bytes"), "bytes", test_id=f"context.{context}.allocator_bytes"),
            *(cell(parts.get(key), "bytes") for key in keys),
        )
        for context, parts in (
            (context, as_mapping(value)) for context, value in as_mapping(plan.get("at_context")).items()
        )
    )
    headers = ("context", "logical", "allocator", "copies", "window slack", "rounding", "padding")
    return Table("What one sequence takes at its fullest, over all ranks", headers, rows)


def _layer_table(plan: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            Cell(str(row.get("kind"))),
            cell(row.get("count"), test_id=f"layer.{index}.count"),
            _or_dash(row.get("num_kv_heads")),
            Cell(f"{row.get('k_head_dim')} / {row.get('v_head_dim')}" if row.get("num_kv_heads") else "–"),
            _or_dash(row.get("window")),
            cell(row.get("bytes_per_token"), "bytes", test_id=f"layer.{index}.bytes_per_token"),
            cell(row.get("state_bytes"), "bytes"),
        )
        for index, row in enumerate(as_mapping(row) for row in as_sequence(find(plan, "kv.layers")))
    )
    headers = ("layers", "count", "KV heads", "head size, K / V", "window", "per token and layer", "state")
    return Table("Layers", headers, rows)


def _or_dash(value: Any) -> Cell:
    return cell(value) if value else Cell("–")


def _capacity_table(capacity: Sequence[Mapping[str, Any]]) -> Table:
    contexts = list(as_mapping(capacity[0].get("max_concurrency")))
    rows = tuple(
        (
            Cell(f"{row.get('num_gpus', 1)} x {row.get('gpu')}"),
            cell(row.get("kv_budget_bytes"), "bytes", test_id=f"card.{index}.kv_budget_bytes"),
            cell(row.get("max_tokens"), test_id=f"card.{index}.max_tokens"),
            *(cell(find(row, f"max_concurrency.{c}"), test_id=f"card.{index}.held.{c}") for c in contexts),
            Cell(_bound_by(row)),
        )
        for index, row in enumerate(capacity[:_MOST_CARDS])
    )
    shown = "" if len(capacity) <= _MOST_CARDS else f", {_MOST_CARDS} of {len(capacity)}"
    headers = (
        "cards",
        "KV budget",
        "longest sequence",
        *(f"held at {_tokens(c)}" for c in contexts),
        "bound by",
    )
    return Table(f"Sequences held at once{shown}", headers, rows)


def _bound_by(row: Mapping[str, Any]) -> str:
    binds = [str(value) for value in as_mapping(row.get("binds")).values()]
    return " / ".join(dict.fromkeys(_BINDS.get(name, name) for name in binds)) or "–"


def _budgets(capacity: Sequence[Mapping[str, Any]]) -> list[Block]:
    formulas = [
        str(row.get("kv_budget_formula")) for row in capacity[:_MOST_CARDS] if row.get("kv_budget_formula")
    ]
    return [Code("\n".join(formulas), summary="How the KV budgets come about")] if formulas else []


def _pick_table(picks: Sequence[Mapping[str, Any]]) -> Table:
    has_prices = any(row.get("price") is not None for row in picks)
    rows = tuple(
        (
            Cell(f"{row.get('num_gpus', 1)} x {row.get('gpu')}"),
            cell(row.get("memory_bytes"), "bytes"),
            cell(row.get("kv_budget_bytes"), "bytes"),
            cell(row.get("held"), test_id=f"pick.{index}.held"),
            *((cell(row.get("price")), cell(row.get("price_per_sequence"))) if has_prices else ()),
        )
        for index, row in enumerate(picks[:_MOST_CARDS])
    )
    more = ("price", "price per sequence") if has_prices else ()
    return Table("Fewest of each card", ("cards", "memory", "KV budget", "held", *more), rows)


def _tier_table(tier: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            Cell(_tokens(row.get("context"))),
            cell(row.get("stored_bytes"), "bytes"),
            cell(row.get("sequences")),
            cell(row.get("load_s"), "s"),
            cell(row.get("recompute_s"), "s"),
            Cell(str(row.get("faster") or "–")),
        )
        for row in (as_mapping(load) for load in as_sequence(tier.get("loads")))
    )
    rate = number(tier.get("bandwidth"))
    speed = "" if rate is None else f", {rate / 1e9:g} GB/s ({tier.get('bandwidth_basis')})"
    caption = f"{tier.get('name')} tier of {show_number(number(tier.get('size_bytes')) or 0, 'bytes')}{speed}"
    return Table(caption, ("sequence", "bytes", "held", "load", "recompute", "faster"), rows)


# --- the trace


def _trace_facts(trace: Mapping[str, Any]) -> Facts:
    lengths, today = as_mapping(trace.get("lengths")), as_mapping(trace.get("today"))
    items: list[tuple[str, Cell]] = [
        ("requests", cell(lengths.get("num_requests"), test_id="trace.num_requests")),
        ("prompt and output, p50", cell(lengths.get("p50"), "tokens", test_id="trace.p50")),
        ("p99", cell(lengths.get("p99"), "tokens", test_id="trace.p99")),
        ("longest", cell(lengths.get("max"), "tokens")),
        ("one request, mean", cell(today.get("mean_bytes"), "bytes", test_id="trace.mean_bytes")),
        ("KV budget", cell(trace.get("kv_budget_bytes"), "bytes")),
        ("held, mean", cell(today.get("expected"))),
        ("held, guaranteed", cell(today.get("guaranteed"), test_id="trace.guaranteed")),
    ]
    items = [(name, shown) for name, shown in items if shown.raw is not None]
    reuse = as_mapping(trace.get("reuse"))
    if reuse:
        items.append(("prompt tokens an endless cache would hit", rate_cell(reuse.get("engine_hit_rate"))))
        items.append(("everything ever cached", cell(reuse.get("unique_bytes"), "bytes")))
    for index, level in enumerate(as_mapping(row) for row in as_sequence(trace.get("levels"))):
        size = show_number(number(level.get("size_bytes")) or 0, "bytes")
        name = f"prompt tokens hit in {level.get('name')} of {size}, kept for prefixes alone"
        items.append((name, rate_cell(level.get("token_hit_rate"), test_id=f"level.{index}.token_hit_rate")))
    return Facts(tuple(items))


def _gain_figure(changes: Sequence[Mapping[str, Any]]) -> Intervals:
    rows = tuple(
        Interval(
            name,
            min(1.0, gain),
            gain,
            max(1.0, gain),
            "good" if gain > 1.005 else "",
            f"{name}: {gain:.2f} x",
        )
        for name, gain in ((str(row.get("change")), number(row.get("gain_expected"))) for row in changes)
        if gain is not None
    )
    return Intervals("Requests held on average, as a multiple of today", "multiple", rows, 1.0, "today")


def _change_table(changes: Sequence[Mapping[str, Any]]) -> Table:
    has_hits = any(row.get("hit_rate") is not None for row in changes)
    rows = tuple(
        (
            Cell(str(row.get("change"))),
            rate_cell(row.get("touched_share"), test_id=f"change.{index}.touched"),
            rate_cell(row.get("lost_tokens_share")),
            cell(find(row, "main.mean_bytes"), "bytes"),
            cell(row.get("gain_expected"), "ratio", test_id=f"change.{index}.gain_expected"),
            cell(row.get("gain_guaranteed"), "ratio", test_id=f"change.{index}.gain_guaranteed"),
            *((rate_cell(row.get("hit_rate"), test_id=f"change.{index}.hit_rate"),) if has_hits else ()),
            Cell(_second_pool(row)),
        )
        for index, row in enumerate(changes)
    )
    hits = ("prompt tokens hit, all of it prefix cache",) if has_hits else ()
    first = ("change", "requests touched", "tokens lost", "mean request", "held, mean", "held, guaranteed")
    headers = (*first, *hits, "second pool")
    return Table("Each change alone, in the same memory", headers, rows)


def _second_pool(row: Mapping[str, Any]) -> str:
    second = as_mapping(row.get("second"))
    if not second:
        return "–"
    count = number(second.get("num_requests")) or 0
    return f"{count:,.0f} requests in {rate_text(row.get('second_memory_share'))} of the memory"
