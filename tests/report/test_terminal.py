"""Terminal pictures: the same data in text."""

from __future__ import annotations

from page_samples import cache_record, serve_record

from kvtune.report.terminal import curve_lines, sparkline, timeline_lines


def test_a_sparkline_rises_with_its_values_and_leaves_gaps_blank() -> None:
    assert sparkline([0.0, 1.0, None, 4.0, 8.0]) == "▁▁ ▄█"


def test_a_long_row_is_merged_by_its_largest() -> None:
    values = [0.0] * 100
    values[37] = 5.0
    line = sparkline(values, width=10)
    assert len(line) == 10
    assert line.index("█") == 3


def test_nothing_but_zeros_is_flat() -> None:
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""


def test_the_curve_fits_its_width_and_names_the_knee() -> None:
    lines = curve_lines(cache_record(), width=50, height=6)
    assert len(lines) == 8
    assert all(len(line) <= 9 + 50 for line in lines)
    assert "knee: 10,000 blocks, 23.7 %" in lines[-1]
    assert lines[-2].index("┴") == 9 + int(49 * 16 / 20)


def test_the_curve_never_falls() -> None:
    """Dots of later columns are never below those of earlier ones."""
    rows = [line[9:] for line in curve_lines(cache_record(), width=40, height=8)[:-2]]
    heights = []
    for column in range(40):
        filled = [r for r, row in enumerate(rows) if ord(row[column]) != 0x2800]
        assert filled
        heights.append(min(filled))
    assert heights == sorted(heights, reverse=True)


def test_a_record_without_a_curve_draws_none() -> None:
    assert curve_lines({}) == []
    assert timeline_lines({}) == []


def test_the_course_of_a_run_names_each_largest_value() -> None:
    text = "\n".join(timeline_lines(serve_record()))
    assert "TTFT p95" in text
    assert "max 79.98 %" in text or "max 79.99 %" in text or "max 80" in text
    assert "preemptions" in text
