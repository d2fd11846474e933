"""Pages for what `plan` and `simulate` know: the tuning report's style and escaping, other sections.

Each takes the very mapping that `--json` prints, so that every number on the page stands there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report.blocks import Bullets, Code, Section
from kvtune.report.cache_sections import cache_answer, cache_sections
from kvtune.report.html import render_page
from kvtune.report.plan_sections import findings_section, plan_answer, plan_sections, trace_plan_sections
from kvtune.report.record import as_mapping, as_sequence, json_text
from kvtune.report.serve_sections import serve_answer, serve_sections
from kvtune.report.workload_sections import workload_section

__all__ = ["render_plan", "render_simulation"]


def render_simulation(record: Mapping[str, Any]) -> str:
    """The page of `kvtune simulate`, either mode.

    `record`: what `--json` prints; `curve` (of `kvtune.cache.curve`) and `statistics` (of `kvtune trace`) are
    shown where they are there.
    """
    name = _file_name(record.get("path") or record.get("workload"))
    if "capacities" in record:
        title, parts = f"Prefix cache on {name}", [cache_answer(record), *cache_sections(record)]
    else:
        title, parts = (
            f"{record.get('model_id')} serving {name}, simulated",
            [serve_answer(record), *serve_sections(record)],
        )
    return _page(title, "kvtune simulate", parts, record, as_mapping(record.get("statistics")))


def render_plan(plan: Mapping[str, Any]) -> str:
    """The page of `kvtune plan`. `plan`: what `--json` prints; `trace.cache` is a record of `simulate --mode
    cache` and `trace.statistics` one of `kvtune trace`, shown where they are there."""
    trace = as_mapping(plan.get("trace"))
    mind = findings_section(plan)
    parts = [
        plan_answer(plan),
        *([mind] if mind is not None else []),
        *trace_plan_sections(trace),
        *cache_sections(as_mapping(trace.get("cache"))),
        *plan_sections(plan),
    ]
    title = f"KV cache of {plan.get('model')}"
    if trace:
        title += f" on {_file_name(trace.get('path'))}"
    return _page(title, "kvtune plan", parts, plan, as_mapping(trace.get("statistics")))


def _page(
    title: str, brand: str, parts: list[Section], record: Mapping[str, Any], workload: Mapping[str, Any]
) -> str:
    shown = workload_section(workload)
    notes = [str(note) for key in ("notes", "assumptions") for note in as_sequence(record.get(key))]
    trace_notes = [str(note) for note in as_sequence(as_mapping(record.get("trace")).get("notes"))]
    notes = list(dict.fromkeys([*notes, *trace_notes, *map(str, as_sequence(workload.get("notes")))]))
    raw = json_text(record)
    sections = [
        *parts,
        *([shown] if shown is not None else []),
        *([Section("Notes", (Bullets(tuple(notes)),))] if notes else []),
        Section("Record", (Code(raw, "record", "Everything above as JSON"),)),
    ]
    return render_page(title, sections, brand=brand)


def _file_name(path: Any) -> str:
    return str(path or "a trace").rsplit("/", 1)[-1]
