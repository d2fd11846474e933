"""The report opens offline in a real browser: no console message, no request beside the file itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from page_samples import cache_record, plan_record, serve_record
from report_sample import sample_result

from kvtune.report import render, render_plan, render_simulation

BROWSER = next((b for b in ("chromium-headless-shell", "chromium", "google-chrome") if shutil.which(b)), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium-headless-shell"),
]


def opened(page: Path, tmp_path: Path) -> tuple[str, str, list[str]]:
    """(DOM after loading, what the browser logged, URLs it asked the network for)."""
    net_log = tmp_path / "net.json"
    result = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
            f"--log-net-log={net_log}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return result.stdout, result.stderr, requested_urls(net_log)


def requested_urls(net_log: Path) -> list[str]:
    text = net_log.read_text().rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except json.JSONDecodeError:  # the browser ends without closing the list
        events = json.loads(text + "]}")["events"]
    return [e["params"]["url"] for e in events if isinstance(e.get("params"), dict) and "url" in e["params"]]


def test_the_report_opens_without_console_message_or_request(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(sample_result()))
    dom, log, urls = opened(page, tmp_path)
    assert 'data-testid="verdict"' in dom and "1,056 B" in dom
    assert "CONSOLE" not in log, log
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        (lambda: render_simulation(cache_record()), 'data-testid="knee"'),
        (lambda: render_simulation(serve_record()), 'data-testid="slo.attainment"'),
        (lambda: render_plan(plan_record()), 'data-testid="growth"'),
    ],
)
def test_pages_of_plan_and_simulate_open_without_console_message_or_request(page, shown, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page())
    dom, log, urls = opened(file, tmp_path)
    assert shown in dom
    assert "CONSOLE" not in log, log
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def test_the_check_itself_sees_a_console_error_and_a_request(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>")
    _, log, urls = opened(page, tmp_path)
    assert "CONSOLE" in log
    assert any(url.startswith("http://127.0.0.1:9/") for url in urls)
