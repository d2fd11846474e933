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
    assert shown(page, "held-winner-bounds")[0] == "35 to 39, n = 320"
    assert shown(page, "held-baseline")[0] == "baseline 19 (18 to 20, n = 320)"
    assert "Hold 37 requests instead of 19 in 1 GiB of KV cache" in page
    assert page.index('data-testid="verdict"') < page.index('data-testid="gain.tpot_s.mean"')


def test_codecs_of_single_layers_are_told_in_the_decision_by_layer() -> None:
    result = sample_result()
    result["winner"]["config"]["layer_codecs"] = {"2": ["int8", "n4_rh"], "3": ["int8", "n4_rh"]}
    assert ", layers 2-3 int8/n4_rh instead; everything else" in render(result)
    result["winner"]["config"]["layer_codecs"] = {HOSTILE: 1}
    assert HOSTILE not in render(result)


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


def test_invisible_and_unencodable_characters_are_shown_as_escapes() -> None:
    hostile = "a\u202egnp.exe\x00\x1b[31m\ud800\U000e0041b"
    result = sample_result()
    result["answers_side_by_side"]["samples"][0] |= {"request_id": hostile, "winner": hostile}
    result["quality"]["reason"] = hostile
    for text in (render(result), render_markdown(result)):
        text.encode()
        assert not {"\u202e", "\x00", "\x1b", "\ud800", "\U000e0041"} & set(text)
        assert "\\u202e" in text.replace("\\\\", "\\")
    raw = re.search(r'data-testid="raw"><code>(.*?)</code>', render(result), re.DOTALL)
    assert raw
    assert json.loads(html.unescape(raw[1])) == result


def test_a_megabyte_in_one_string_stays_one_cell_of_a_small_page() -> None:
    result = sample_result()
    result["answers_side_by_side"]["samples"][0]["baseline"] = "x" * 1_000_000
    assert len(render(result).encode()) < 2_000_000


def test_where_harm_begins_and_what_each_setting_gives_are_shown() -> None:
    result = sample_result()
    page = render(result)
    for row in result["ablation"]["variants"]:
        name = row["setting"]
        assert shown(page, f"ablation.{name}.bytes")[1] == row["metrics"]["kv_bytes_per_token"]
        assert shown(page, f"ablation.{name}.kl")[1] == row["quality"]["metrics"]["kl"]["excess"]["value"]
        assert shown(page, f"ablation.{name}.tpot")[1] == row["ratios"]["tpot_s.mean"]["value"]
    assert "No time was left to measure: block_size." in page
    assert shown(page, "failing-bytes") == ("800 B", 800.0)


def test_memory_that_was_foreseen_to_the_byte_says_so_and_a_miss_too() -> None:
    page = render(sample_result())
    assert page.count("to the byte") == 9  # five moments of two sides, one of them 7 bytes off
    assert "% off" in page
    assert shown(page, "memory.winner.in-decode.used_bytes")[1] == 3128 * 1056 + 7


def test_differences_between_answers_are_marked_on_both_sides() -> None:
    page = render(sample_result())
    assert "<del>path</del>" in page and "<ins>road</ins>" in page
    assert "<ins>great </ins>" in page or "<ins> great</ins>" in page
    assert "nowhere: equal" in page


def test_every_kind_of_request_is_named_also_the_ones_that_are_missing() -> None:
    result = sample_result()
    page = render(result)
    for case in ("easy", "average", "long context", "malformed", "high-value"):
        assert f">{case}</th>" in page
    assert shown(page, "case.malformed.requests")[1] == 10
    del result["workload"]["cases"]["average"]
    result["quality"]["answers"] = None
    page = render(result)
    assert "none in this workload" in page and "none given (--high-value FILE)" in page


@pytest.mark.parametrize(
    "label",
    ["Model repository", "Revision", "Weights, stored as", "KV precision, winner: keys", "Tokenizer, SHA-256",
     "Chat template, SHA-256", "Runtime version", "GPU", "GPU driver", "CUDA", "CPU", "Memory",
     "Disk, measured bandwidth", "Longest sequence, tokens", "Batch: requests at once",
     "Workload file, SHA-256", "Prompts as sent, SHA-256"],
)  # fmt: skip
def test_the_identity_names_what_is_missing(label: str) -> None:
    for result in (sample_result(), {**sample_result(), "identity": {}, "winner": {}, "workload": {}}):
        assert f"<dt>{label}</dt>" in render(result)
    bare = render({**sample_result(), "identity": {}, "winner": {}, "workload": {}})
    assert re.search(rf"<dt>{re.escape(label)}</dt><dd[^>]*>not recorded<", bare)


def test_a_kept_baseline_reads_as_a_decision_not_as_a_win() -> None:
    result = {**sample_result(), "status": "no_significant_gain"}
    result["winner"] = {**result["baseline"], "is_baseline": True}
    for key in ("ablation", "memory", "positions", "answers_side_by_side"):
        del result[key]
    page = render(result)
    assert "<h1>Keep the baseline" in page
    assert "Hold 37" not in page
    assert "nothing to take apart" in page
