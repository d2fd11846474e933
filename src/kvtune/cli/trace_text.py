"""What `kvtune trace` prints for people: short tables, every figure with its unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvtune.cli.table import text_table

if TYPE_CHECKING:
    from kvtune.cache.forecast import Forecast
    from kvtune.workload import LintReport
    from kvtune.workload.lint import Finding

__all__ = ["forecast_text", "lint_text", "statistics_text"]

_BARS = " .:-=+*#%@"
_WIDTH = 60


def statistics_text(statistics: dict[str, Any]) -> str:
    """Lengths, arrivals, reuse and stationarity of one trace."""
    return "\n".join(
        [
            f"{statistics['path']}",
            *(f"  {note}" for note in statistics["notes"] if note not in statistics["warnings"]),
            f"requests   {statistics['num_requests']:,} in {statistics['num_sessions']:,} sessions",
            *_arrivals(statistics),
            f"prompt     {_lengths(statistics['input_tokens'])}",
            f"output     {_lengths(statistics['output_tokens'])}",
            f"reuse      {_ideal(statistics['prefix'])}",
            *_reuse(statistics["reuse"]),
            *_stationarity(statistics["stationarity"]),
            *_next(statistics),
        ]
    )


def _lengths(lengths: dict[str, Any] | None) -> str:
    if lengths is None:
        return "length not recorded"
    quantiles = ", ".join(f"{name} {lengths[name]:,.0f}" for name in ("p50", "p90", "p99", "max"))
    return f"{quantiles} {lengths['unit']}"


def _arrivals(statistics: dict[str, Any]) -> list[str]:
    found = statistics["arrivals"]
    if found is None:
        return ["arrivals   not recorded"]
    clock = ", clock is coarse" if found["is_clock_coarse"] else ""
    lines = [
        f"arrivals   {found['rate_per_s']:,.3g} per second over {found['duration_s']:,.0f} s, "
        f"{found['kind']}, gap CV {found['cv']:.2f}{clock}"
    ]
    lines += [
        f"           in {row['window_s']:g} s: peak {row['peak_to_mean']:.1f} x mean, "
        f"variance {row['index']:.1f} x Poisson's"
        for row in found["dispersion"]
        if row["mean_count"] >= 1
    ]
    return [*lines, f"           |{_sparkline(found['timeline']['counts'])}|"]


def _sparkline(counts: Sequence[int]) -> str:
    """Counts as characters from blank to @, at most 60 of them."""
    step = -(-len(counts) // _WIDTH)
    bars = [max(counts[at : at + step]) for at in range(0, len(counts), step)]
    highest = max(bars) or 1
    return "".join(_BARS[-(-bar * (len(_BARS) - 1) // highest)] for bar in bars)


def _ideal(prefix: dict[str, Any]) -> str:
    if prefix["ideal_block_hit_rate"] is None:
        return "unknown: the trace holds lengths only"
    counts = f"{prefix['hit_blocks']:,} of {prefix['total_blocks']:,}, {prefix['block_size']} tokens each"
    bound = ", a lower bound" if prefix["is_lower_bound"] else ""
    rate = prefix["ideal_token_hit_rate"]
    return f"at most {rate:.1%} of tokens, {prefix['ideal_block_hit_rate']:.1%} of blocks ({counts}{bound})"


def _reuse(reuse: dict[str, Any] | None) -> list[str]:
    if reuse is None:
        return []
    later = reuse["second_half"]["ideal_block_hit_rate"]
    popularity = reuse["popularity"]
    lines = [
        f"           second half {later or 0:.1%} of blocks; {popularity['never_reused_share'] or 0:.0%} of "
        f"the blocks are never reused, a tenth of them make "
        f"{popularity['top_tenth_share_of_reuse'] or 0:.0%} of reuse"
    ]
    seconds = reuse["gaps"]["seconds"]
    if seconds is not None:
        lines.append(
            f"           time to reuse p50 {seconds['p50']:,.0f} s, p90 {seconds['p90']:,.0f} s"
            f"{_law(reuse['law'])}"
        )
    if reuse["reused_within_s"]:
        shares = ", ".join(f"{float(s):g} s {share:.0%}" for s, share in reuse["reused_within_s"].items())
        lines.append(f"           of all blocks used, used again within {shares}")
    if reuse["sources"] is not None:
        sources = reuse["sources"]
        lines.append(
            f"           from the same session {sources['same_session']:.0%}, from others "
            f"{sources['other_session']:.0%}"
        )
    return lines


def _law(law: dict[str, Any] | None) -> str:
    if law is None:
        return ""
    parameters = ", ".join(
        f"{name.removesuffix('_s')} {value:.3g}{' s' if name.endswith('_s') else ''}"
        for name, value in law["parameters"].items()
    )
    return f"; {law['name']} law ({parameters}; off by {law['distance']:.0%} at most)"


def _stationarity(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    words = {"stationary": "yes: its past tells its future", "too_short": "unknown", "drifting": "no"}
    lines = [
        f"stationary {words[found['verdict']]}",
        *(f"           {reason}" for reason in found["reasons"]),
    ]
    load = found["load"]
    if load is not None and load["is_drifting"]:
        lines.append("           the load changes too, which matters for latency and not for reuse")
    return lines


def _next(statistics: dict[str, Any]) -> list[str]:
    if statistics["reuse"] is None:
        return []
    path = statistics["path"]
    return [f"next: kvtune trace lint {path}", f"      kvtune simulate {path} --mode cache"]


def lint_text(path: str, report: LintReport) -> str:
    """The findings, worst first, each with its place, its price and its remedy."""
    about = "about " if report.is_estimated else ""
    lines = [
        f"{path}: {report.num_requests:,} requests, {about}{report.prompt_tokens:,} prompt tokens, "
        f"{report.reused_tokens / max(1, report.prompt_tokens):.1%} reusable as they are"
    ]
    for finding in report.findings:
        lines += _finding(finding, about)
    if not report.findings:
        lines.append("nothing found that breaks prefixes")
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines)


def _finding(finding: Finding, about: str) -> list[str]:
    from kvtune.workload.lint import RULES

    rule = RULES[finding.rule]
    lines = [
        f"{finding.level:<6} {finding.rule}: {rule.title}, {_where(finding)}",
        f"       loses {about}{finding.lost_tokens:,} tokens ({finding.lost_share:.1%} of all prompts') in "
        f"{finding.num_requests:,} requests",
    ]
    lines += [f"       {_shown(one)}  against  {_shown(other)}" for one, other in finding.samples[:2]]
    if finding.behind:
        lines.append(f"       further on in the same prompts: {', '.join(finding.behind)}")
    return [*lines, f"       {rule.fix}"]


def _where(finding: Finding) -> str:
    position = finding.position
    token = f"token {position.token:,}"
    if position.message is None:
        return f"after {token}"
    if position.message < 0:
        return f"in the list of tools, {token}"
    if position.role == "prompt":
        return f"at character {position.character:,} of the prompt, {token}"
    return f"in message {position.message} ({position.role}), character {position.character:,}, {token}"


def _shown(text: str) -> str:
    """A prompt may hold anything, so nothing but printable ASCII reaches the terminal."""
    return ascii(text)


def forecast_text(path: str, block_size: int, forecasts: Sequence[Forecast]) -> str:
    """One line per capacity, then the reasons why some have no forecast."""
    rows = [
        [
            "unbounded" if one.capacity_blocks is None else f"{one.capacity_blocks:,}",
            one.status,
            "-" if one.hit_rate is None else f"{one.hit_rate:.1%}",
            "-" if one.low is None or one.high is None else f"{one.low:.1%} to {one.high:.1%}",
            "-" if one.actual is None else f"{one.actual:.1%}",
        ]
        for one in forecasts
    ]
    head = ["capacity", "past is", "forecast", "90 % interval", "came"]
    first = forecasts[0]
    title = (
        f"{path}: block hit rate under {first.policy}, blocks of {block_size} tokens, from the first "
        f"{first.num_history:,} requests"
    )
    reasons = dict.fromkeys(reason for one in forecasts for reason in one.reasons)
    return "\n".join([title, *text_table(head, rows, left=2), *(f"- {reason}" for reason in reasons)])
