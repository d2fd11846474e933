"""The report says what the record says, whoever wrote the strings in it."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
from report_sample import HOSTILE, sample_result

from kvtune.report import render, render_markdown


def shown(page: str, test_id: str) -> tuple[str, Any]:
    """(text, recorded value) of the element with a test id."""
    match = re.search(rf'data-testid="{re.escape(test_id)}"([^>]*)>([^<]*)<', page)
    assert match, f"{test_id} is not shown"
    value = re.search(r'data-value="([^"]*)"', match[1])
    return html.unescape(match[2]), None if value is None else json.loads(html.unescape(value[1]))


def test_the_decision_comes_first_and_equals_the_record() -> None:
    page = render(sample_result())
    assert shown(page, "verdict")[0] == "PASS"
    assert shown(page, "winner-bytes-per-token") == ("1,056 B", 1056.0)
    assert shown(page, "baseline-bytes-per-token") == ("baseline 2,048 B", 2048.0)
    assert shown(page, "bytes-saved")[0] == "48.4 % fewer"
    assert shown(page, "held-winner") == ("37", 37.4)
    assert shown(page, "held-winner-bounds")[0] == "37 (35 to 39, n = 320)"
    assert shown(page, "held-baseline")[0] == "baseline 19 (18 to 20, n = 320)"
    assert "Hold 37 requests instead of 19 in 1 GiB of KV cache" in page
    assert page.index('data-testid="verdict"') < page.index('data-testid="gain.tpot_s.mean"')


def test_every_gain_and_metric_equals_the_record() -> None:
    result = sample_result()
    page = render(result)
    for name, gain in result["gain"].items():
        assert shown(page, f"gain.{name}")[1] == gain["ratio"]
    for name, metric in result["quality"]["metrics"].items():
        assert shown(page, f"quality.{name}")[1] == metric["excess"]["value"]
        assert shown(page, f"margin.{name}")[1] == metric["margin"]


def test_strings_from_the_record_never_become_markup() -> None:
    page = render(sample_result())
    assert HOSTILE not in page
    assert "<img" not in page and "<script" not in page.lower()
    assert html.escape(HOSTILE) in page or html.escape(HOSTILE, quote=False) in page


def test_markdown_keeps_hostile_strings_out_of_tables_and_html() -> None:
    text = render_markdown(sample_result())
    outside_of_code = re.sub(r"(?ms)^(```+).*?^\1", "", text)
    assert "<img" not in outside_of_code
    assert "PASS" in text and "1,056" in text


def test_the_page_forbids_every_request_and_holds_no_reference_outside() -> None:
    page = render(sample_result())
    assert "default-src 'none'" in page
    body = page[: page.index('data-testid="raw"')]
    assert not re.search(r"""(?:src|href|action)\s*=\s*["'](?!#)""", body)
    assert "url(" not in body and "@import" not in body


def test_fields_that_are_missing_are_said_to_be_missing() -> None:
    page = render({"schema_version": 1})
    assert page.count("not recorded") >= 5
    assert "Traceback" not in page


@pytest.mark.parametrize("key", sorted(sample_result()))
def test_any_single_missing_field_still_gives_a_page(key: str) -> None:
    result = sample_result()
    del result[key]
    assert "<h1>" in render(result)
    assert render_markdown(result)


@pytest.mark.parametrize("value", [None, 7, "text", [], {}, [[None]], {"a": {"b": [1]}}, float("nan")])
@pytest.mark.parametrize(
    "key", ["gain", "quality", "trials", "held", "winner", "aa_noise", "smallest_failing_step"]
)
def test_a_field_of_another_type_gives_a_page_all_the_same(key: str, value: Any) -> None:
    result = {**sample_result(), key: value}
    assert "<h1>" in render(result)


def test_undecided_speed_is_said_in_the_decision() -> None:
    page = render({**sample_result(), "speed_verdict": "UNDECIDED"})
    assert "Speed is UNDECIDED" in page
    assert "Speed is UNDECIDED" not in render(sample_result())


def test_what_got_worse_stays_in_sight() -> None:
    result = sample_result()
    result["gain"]["tpot_s"] = {"ratio": 1.08, "low": 1.05, "high": 1.1, "significant": True}
    assert "What got worse" in render(result)


def test_two_hundred_trials_stay_under_two_megabytes() -> None:
    result = sample_result()
    result["trials"] = [{**t, "number": i} for i, t in enumerate(result["trials"] * 20)]
    assert len(render(result).encode()) < 2_000_000
