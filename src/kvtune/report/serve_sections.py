"""What a page says of a simulated server: latencies, hits, how busy it was, and the course of it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvtune.report.blocks import Block, Cell, Facts, Lines, Paragraph, Section, Series, Table, cell
from kvtune.report.record import as_mapping, as_sequence, number, show_number, unit_of
from kvtune.report.workload_sections import rate_cell, rate_text

__all__ = ["serve_answer", "serve_sections"]

_LATENCIES: Final = (
    ("ttft", "TTFT"),
    ("tpot", "TPOT"),
    ("itl", "ITL"),
    ("e2el", "end to end"),
    ("queue", "in the queue"),
)
_LEVELS: Final = ("mean", "median", "p90", "p95", "p99")


def serve_answer(record: Mapping[str, Any]) -> Section:
    """What a reader wants first: does it keep up, and how fast."""
    blocks: list[Block] = [_verdict(record)]
    slo = as_mapping(record.get("slo"))
    cards: list[tuple[str, Cell]] = [
        ("TTFT p95", _ms_cell(record.get("p95_ttft_ms"), "p95_ttft_ms")),
        ("TPOT p95", _ms_cell(record.get("p95_tpot_ms"), "p95_tpot_ms")),
        ("requests per s", cell(record.get("request_throughput"), test_id="request_throughput")),
        ("output tokens per s", cell(record.get("output_throughput"), test_id="output_throughput")),
        ("prompt tokens hit", rate_cell(record.get("token_hit_rate"), test_id="token_hit_rate")),
        ("preemptions", cell(record.get("preemptions"), test_id="preemptions")),
    ]
    if slo:
        cards.insert(0, ("requests within SLO", rate_cell(slo.get("attainment"), test_id="slo.attainment")))
        cards.insert(1, ("goodput, requests per s", cell(slo.get("request_goodput"), test_id="slo.goodput")))
    blocks.append(Facts(tuple(cards), is_headline=True))
    return Section("Answer", tuple(blocks))


def _verdict(record: Mapping[str, Any]) -> Paragraph:
    overload = as_mapping(record.get("overload"))
    served = f"{_count(record.get('completed'))} of {_count(record.get('num_prompts'))} requests served"
    if overload.get("is_sustained"):
        length = show_number(number(overload.get("longest_queueing_s")) or 0.0, "s")
        return Paragraph(f"{served}. The server cannot keep up: requests queue for {length} on end.", "bad")
    share = number(overload.get("queueing_share_of_time"))
    if share is None:
        return Paragraph(f"{served}.")
    return Paragraph(f"{served}. Somebody waited for room during {rate_text(share)} of the time.", "good")


def serve_sections(record: Mapping[str, Any]) -> list[Section]:
    """Latencies, the timeline, cache and load, and what the step times rest on."""
    sections = [Section("Latency", (_latency_table(record),))]
    figures = _timeline(as_mapping(record.get("timeline")))
    if figures:
        sections.append(Section("Course of the run", tuple(figures)))
    sections.append(Section("Cache", (_cache_facts(record), *_misses(record))))
    sections.append(Section("Load", (_load_facts(record),)))
    model = as_mapping(record.get("cost_model"))
    if model:
        sections.append(Section("Where step times come from", (_plain_facts(model),)))
    server = as_mapping(record.get("server"))
    if server:
        settings = {**as_mapping(server.get("scheduler")), **as_mapping(server.get("cache")), **server}
        sections.append(Section("Server", (_plain_facts(settings),)))
    return sections


def _count(value: Any) -> str:
    count = number(value)
    return "?" if count is None else f"{count:,.0f}"


def _ms_cell(value: Any, test_id: str) -> Cell:
    """Milliseconds as recorded, shown in the unit that reads best."""
    milliseconds = number(value)
    if milliseconds is None:
        return cell(None, test_id=test_id)
    return Cell(show_number(milliseconds / 1000, "s"), value, test_id)


def _latency_table(record: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for stem, name in _LATENCIES:
        keys = [f"{level}_{stem}_ms" for level in _LEVELS]
        if any(record.get(key) is not None for key in keys):
            rows.append((Cell(name), *(_ms_cell(record.get(key), f"latency.{key}") for key in keys)))
    return Table("Over completed requests", ("", *_LEVELS), tuple(rows))


# --- the course


def _timeline(timeline: Mapping[str, Any]) -> list[Block]:
    starts = [number(value) for value in as_sequence(timeline.get("start_s"))]
    if len(starts) < 2 or None in starts:
        return []
    times = [start for start in starts if start is not None]
    width = number(timeline.get("bin_s")) or 1.0

    def series(key: str, name: str, look: int, *, scale: float = 1.0, is_area: bool = False) -> Series:
        values = [number(value) for value in as_sequence(timeline.get(key))]
        points = tuple((t, None if v is None else v * scale) for t, v in zip(times, values, strict=False))
        return Series(name, points, look, is_area=is_area)

    per_second = 1.0 / width
    drawn = (
        ("Requests per second", "per s", "",
         (series("arrivals", "arriving", 0, scale=per_second),
          series("completed", "completed", 1, scale=per_second))),
        ("Requests in the server", "requests", "",
         (series("running", "running", 0, is_area=True), series("waiting", "waiting", 1))),
        ("KV blocks", "of all blocks", "%",
         (series("kv_referenced", "in use", 0, scale=100.0, is_area=True),
          series("kv_idle", "kept for reuse", 1, scale=100.0))),
        ("Tokens per second", "tokens per s", "",
         (series("prefill_tokens_per_s", "prefill", 0), series("decode_tokens_per_s", "decode", 1))),
        ("Prompt tokens found in the cache", "of prompt tokens", "%",
         (series("token_hit_rate", "hit", 0, scale=100.0),)),
        ("TTFT p95 of requests by arrival", "TTFT p95", "s",
         (series("p95_ttft_ms", "TTFT p95", 0, scale=1e-3),)),
        ("Preemptions", "per bin", "", (series("preemptions", "preemptions", 0, is_area=True),)),
    )  # fmt: skip
    return [_course(*one) for one in drawn if _has_values(one[3])]


def _has_values(series: Sequence[Series]) -> bool:
    return any(value for one in series for _, value in one.points)


def _course(title: str, y_label: str, y_unit: str, series: tuple[Series, ...]) -> Lines:
    parts: list[str] = []
    for one in series:
        known = [(y, x) for x, y in one.points if y is not None]
        if known:
            top, at = max(known)
            parts.append(f"{one.name}: at most {show_number(top, y_unit)}, at {show_number(at, 's')}")
    return Lines(
        title, "time", y_label, series, f"{'; '.join(parts)}.", x_unit="s", y_unit=y_unit, is_flat=True
    )


# --- tables


def _cache_facts(record: Mapping[str, Any]) -> Facts:
    tiers = as_mapping(record.get("hits_by_tier"))
    return Facts(
        (
            ("prompt tokens hit", rate_cell(record.get("token_hit_rate"))),
            *(
                (f"tokens hit in {tier}", cell(count, test_id=f"hits_by_tier.{tier}"))
                for tier, count in tiers.items()
            ),
            ("blocks evicted", cell(record.get("evicted_blocks"), test_id="evicted_blocks")),
            ("requests preempted", cell(record.get("preempted_requests"), test_id="preempted_requests")),
            ("tokens computed again", cell(record.get("recomputed_tokens"), test_id="recomputed_tokens")),
        )
    )


def _misses(record: Mapping[str, Any]) -> list[Block]:
    causes = as_mapping(record.get("missed_tokens"))
    counts = {str(cause): count for cause, value in causes.items() if (count := number(value))}
    if not counts:
        return []
    total = sum(counts.values())
    rows = tuple(
        (
            Cell(cause.replace("_", " ")),
            cell(causes[cause], test_id=f"missed_tokens.{cause}"),
            Cell(f"{100 * count / total:.1f} %"),
        )
        for cause, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return [Table("Why prompt tokens were computed", ("cause", "tokens", "share"), rows)]


def _load_facts(record: Mapping[str, Any]) -> Facts:
    use, overload = as_mapping(record.get("utilisation")), as_mapping(record.get("overload"))
    return Facts(
        (
            ("busy", rate_cell(use.get("busy"), test_id="utilisation.busy")),
            ("KV in use, mean", rate_cell(use.get("kv_referenced_mean"), test_id="utilisation.kv_mean")),
            ("KV in use, most", rate_cell(use.get("kv_referenced_peak"), test_id="utilisation.kv_peak")),
            ("running, mean", cell(use.get("running_mean"), test_id="utilisation.running_mean")),
            ("running, most", cell(use.get("running_peak"))),
            ("tokens per step, mean", cell(use.get("tokens_per_step_mean"))),
            ("waiting, most", cell(overload.get("waiting_peak"), test_id="overload.waiting_peak")),
            ("longest time with a queue", cell(overload.get("longest_queueing_s"), "s")),
            ("requests that came in it", cell(overload.get("requests_in_longest_queueing"))),
            ("TTFT p95 in it", _ms_cell(overload.get("p95_ttft_ms_inside"), "overload.p95_ttft_ms_inside")),
            ("TTFT p95 outside", _ms_cell(overload.get("p95_ttft_ms_outside"), "overload.p95_outside")),
            ("time to drain after the last arrival", cell(overload.get("drain_s"), "s")),
        )
    )


def _plain_facts(settings: Mapping[str, Any]) -> Facts:
    """Whatever is a single value."""
    plain = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    return Facts(
        tuple(
            (str(key).replace("_", " "), cell(value, "bytes" if key == "kv_budget" else unit_of(key)))
            for key, value in plain.items()
        )
    )
