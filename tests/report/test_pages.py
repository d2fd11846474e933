"""The pages of plan and simulate say what the record says, whoever wrote the strings in it."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from page_samples import HOSTILE, cache_record, plan_record, serve_record

from kvtune.report import render_plan, render_simulation

PAGES: dict[str, tuple[Callable[[Mapping[str, Any]], str], Callable[[], dict[str, Any]]]] = {
    "cache": (render_simulation, cache_record),
    "serve": (render_simulation, serve_record),
    "plan": (render_plan, plan_record),
}


@pytest.fixture(params=list(PAGES))
def page(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    render, record = PAGES[request.param]
    return render(record()), record()


def values(page: str) -> dict[str, tuple[Any, str]]:
    """test id -> (recorded value, text)."""
    found = re.findall(r'data-testid="([^"]+)" data-value="([^"]*)"[^>]*>([^<]*)<', page)
    return {html.unescape(i): (json.loads(html.unescape(v)), html.unescape(t)) for i, v, t in found}


def numbers(record: Any) -> Iterator[float]:
    """Every number anywhere in the record."""
    if isinstance(record, Mapping):
        for value in record.values():
            yield from numbers(value)
    elif isinstance(record, list):
        for value in record:
            yield from numbers(value)
    elif isinstance(record, int | float) and not isinstance(record, bool):
        yield record


def test_every_marked_number_stands_in_the_record(page: tuple[str, dict[str, Any]]) -> None:
    text, record = page
    known = set(numbers(record))
    shown = values(text)
    assert len(shown) > 15
    for name, (value, _) in shown.items():
        assert value in known or not isinstance(value, int | float), name


def test_the_embedded_record_is_the_record(page: tuple[str, dict[str, Any]]) -> None:
    text, record = page
    embedded = re.search(r'data-testid="record"><code>(.*?)</code>', text, re.DOTALL)
    assert embedded
    assert json.loads(html.unescape(embedded[1])) == record


def test_strings_from_the_record_never_become_markup(page: tuple[str, dict[str, Any]]) -> None:
    text, _ = page
    assert HOSTILE not in text
    assert "<img" not in text
    assert "<script" not in text.lower()
    assert html.escape(HOSTILE) in text


def test_the_page_asks_for_nothing_and_allows_nothing(page: tuple[str, dict[str, Any]]) -> None:
    text, _ = page
    assert "default-src 'none'; style-src 'sha256-" in text
    assert not re.search(r"""(?:src|href)=["'](?!#)""", text)
    assert "url(" not in text
    assert "@import" not in text
    assert "style=" not in text  # the policy would drop it
    assert len(text.encode()) < 2_000_000


def test_every_figure_is_valid_and_says_in_words_what_it_shows(page: tuple[str, dict[str, Any]]) -> None:
    text, _ = page
    figures = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', text, re.DOTALL)
    assert figures
    for figure in figures:
        root = ET.fromstring(figure)
        assert root.get("aria-label")
        assert root.find("title") is not None
        for element in root.iter():
            for name in ("x", "y", "x1", "x2", "cx", "cy", "width", "height"):
                assert not re.search("nan|inf", element.get(name, "")), ET.tostring(element)


def test_light_and_dark_and_phone_are_in_the_style(page: tuple[str, dict[str, Any]]) -> None:
    assert "prefers-color-scheme:dark" in page[0]
    assert 'name="viewport"' in page[0]


def test_headings_are_unique_and_linked(page: tuple[str, dict[str, Any]]) -> None:
    anchors = re.findall(r'<h2 id="([^"]+)"', page[0])
    assert len(anchors) == len(set(anchors))
    assert re.findall(r'<li><a href="#([^"]+)"', page[0]) == anchors


def test_the_cache_page_answers_at_the_size_where_more_would_buy_most() -> None:
    shown = values(render_simulation(cache_record()))
    row = cache_record()["capacities"][1]
    assert shown["oracle"][0] == row["oracle"]["block_hit_rate"]
    assert shown["half-bytes"][0] == row["what_if"]["half_bytes_per_block"]["block_hit_rate"]
    assert shown["block_hit_rate"] == (0.12, "12.0 %")
    assert shown["knee"][0] == 10_000


def test_a_policy_below_lru_is_shown_as_a_loss() -> None:
    text = render_simulation(cache_record())
    name = html.escape(HOSTILE)
    assert re.search(rf'data-testid="capacity\.1\.{re.escape(name)}\.gap" [^>]*class="bad">-7 %<', text)
    assert re.search(rf'data-testid="capacity\.0\.{re.escape(name)}\.gap" [^>]*class="good">\+23 %<', text)


def test_the_serve_page_shows_every_latency_and_the_goodput() -> None:
    record = serve_record()
    shown = values(render_simulation(record))
    for level in ("mean", "median", "p90", "p95", "p99"):
        for name in ("ttft", "tpot", "itl", "e2el", "queue"):
            assert shown[f"latency.{level}_{name}_ms"][0] == record[f"{level}_{name}_ms"]
    assert shown["slo.attainment"] == (0.731, "73.1 %")
    assert shown["preemptions"][0] == 7


def test_a_server_that_cannot_keep_up_says_so_first() -> None:
    record = serve_record()
    record["overload"]["is_sustained"] = True
    text = render_simulation(record)
    assert text.index("cannot keep up") < text.index('<h2 id="latency"')


def test_the_plan_page_shows_contexts_cards_and_changes() -> None:
    shown = values(render_plan(plan_record()))
    assert shown["growth"] == (131_072, "128 KiB")
    assert shown["context.8192.allocator_bytes"][0] == 1_090_519_040
    assert shown["card.0.held.8192"][0] == 54
    assert shown["change.2.gain_expected"][0] == 3.77
    assert shown["change.2.hit_rate"] == (0.061, "6.1 %")
    assert shown["level.0.token_hit_rate"][0] == 0.0447


def test_a_warning_comes_before_a_remark() -> None:
    text = render_plan(plan_record())
    assert text.index(f'<p class="warn">{html.escape(HOSTILE)}') < text.index("harmless")


@pytest.mark.parametrize("name", list(PAGES))
def test_a_record_with_nothing_in_it_still_makes_a_page(name: str) -> None:
    render, record = PAGES[name]
    empty: dict[str, Any] = {"capacities": []} if name == "cache" else {}
    assert "</html>" in render(empty)
    for key in record():
        partial = record()
        del partial[key]
        assert "</html>" in render(partial)
        partial[key] = None
        assert "</html>" in render(partial)
