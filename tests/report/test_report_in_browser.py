"""The report opens offline in a real browser: no console message, no request beside the file itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, DESKTOP, PHONE, Browser
from page_samples import cache_record, plan_record, serve_record
from report_sample import sample_result
from shown import Shown, check_numbers, is_shown_by, numbers_in, orphans

from kvtune.report import render, render_plan, render_simulation

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium-headless-shell"),
]

WINDOWS = {"desktop": DESKTOP, "phone": PHONE}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser with scripts switched off, for all tests that only look."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(sample_result()))
    return file


def outside(urls: list[str]) -> list[str]:
    return [url for url in urls if not url.startswith(("file:", "data:"))]


def test_the_report_opens_without_console_message_or_request(browser: Browser, page: Path) -> None:
    dom = browser.open(page).dom()
    assert 'data-testid="verdict"' in dom and "1,056 B" in dom
    assert browser.messages() == []
    assert outside(browser.requests()) == []


@pytest.mark.parametrize(
    ("draw", "shown"),
    [
        (lambda: render_simulation(cache_record()), 'data-testid="knee"'),
        (lambda: render_simulation(serve_record()), 'data-testid="slo.attainment"'),
        (lambda: render_plan(plan_record()), 'data-testid="growth"'),
    ],
)
def test_pages_of_plan_and_simulate_open_without_message_request_or_overflow(draw, shown, browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(draw())
    for size in WINDOWS.values():
        assert shown in browser.open(file, size=size).dom()
        assert browser.messages() == []
        assert outside(browser.requests()) == []
        assert browser.content_size()[0] <= size[0]


def test_the_check_itself_sees_a_console_error_and_a_request(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>")
    with Browser(tmp_path / "profile", has_scripts=True) as browser:
        browser.open(page)
        assert any("seen" in message for message in browser.messages())
        assert any(url.startswith("http://127.0.0.1:9/") for url in browser.requests())


# ---------------------------------------------------------------- numbers


def test_every_number_on_the_page_is_the_one_in_the_json(browser: Browser, page: Path) -> None:
    shown = Shown(browser.open(page).dom())
    assert len(shown.marked) > 350
    assert check_numbers(shown, sample_result()) > 400


def test_no_number_stands_in_a_cell_without_its_place_in_the_json(browser: Browser, page: Path) -> None:
    assert orphans(Shown(browser.open(page).dom())) == []


def test_the_check_of_numbers_sees_a_wrong_one() -> None:
    assert is_shown_by("1,056", "B", "", 1056.0)
    assert is_shown_by("48.4", "%", "48.4 % fewer", 0.515625)
    assert is_shown_by("10.30", "ms", "", {"mean": 0.0103, "n": 64})
    assert not is_shown_by("10.31", "ms", "", {"mean": 0.0103, "n": 64})
    assert not is_shown_by("1,057", "B", "", 1056.0)
    assert list(numbers_in("0.897x (0.848x to 9e-05, n = 64), 12.5 ms, k_codec=int8")) == [
        ("0.897", ""), ("0.848", ""), ("9e-05", ""), ("64", ""), ("12.5", "ms"),
    ]  # fmt: skip


# ---------------------------------------------------------------- layout and colours


@pytest.mark.parametrize("window", list(WINDOWS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_out_of_the_window(browser: Browser, page: Path, window: str, scheme: str) -> None:
    size = WINDOWS[window]
    width, height = browser.open(page, size=size, scheme=scheme).content_size()
    assert width <= size[0]
    assert height > 2 * size[1]


@pytest.mark.parametrize("window", list(WINDOWS))
def test_no_text_is_cut_off_outside_of_what_scrolls(tmp_path: Path, page: Path, window: str) -> None:
    script = """[...document.querySelectorAll('main *')].filter(e => !e.closest('svg, pre, .scroll, .drawing')
        && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline')
        .map(e => e.outerHTML.slice(0, 120))"""
    with Browser(tmp_path / "profile", has_scripts=True) as browser:
        browser.open(page, size=WINDOWS[window])
        assert browser.evaluate(script) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scheme_asked_for_is_the_one_drawn(tmp_path: Path, page: Path, scheme: str) -> None:
    with Browser(tmp_path / "profile", has_scripts=True) as browser:
        browser.open(page, scheme=scheme)
        script = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        background = browser.evaluate(script)
    assert (sum(background) > 600) == (scheme == "light")
