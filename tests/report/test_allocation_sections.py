"""Where the bits went: the page shows the record's codecs, bytes and sensitivities, and survives odd ones."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
from report_sample import HOSTILE, config, estimate, sample_result

from kvtune.report import render, render_markdown

KL = {("k", 0): 0.012, ("v", 0): 0.02, ("k", 1): 0.0018, ("v", 1): 0.0004}


def layers(**more: Any) -> dict[str, Any]:
    table = {"1": ["int8", "n4_rh"]}
    codec = {("k", 0): "int8", ("v", 0): "int8", ("k", 1): "int8", ("v", 1): "n4_rh"}
    return {
        "anchor": config("int8", "int8"), "anchor_bytes_per_token": 528.0, "skipped": "", "is_winner": True,
        "shown": config("int8", "int8", layer_codecs=table), "bytes_per_token": 468.0,
        "padding_bytes_per_token": 0.0, "num_requests": 48, "units": [[0], [1]],
        "sides": [
            {"layer": n, "side": s, "codec": codec[s, n],
             "bytes_per_token": 72.0 if codec[s, n] == "n4_rh" else 132.0,
             "kl": estimate(KL[s, n], KL[s, n] * 0.9, KL[s, n] * 1.2) if codec[s, n] == "n4_rh" else None}
            for n in (0, 1) for s in "kv"
        ],
        "sensitivities": [
            {"layers": [n], "side": s, "codec": "n4_rh", "method": "planes",
             "kl": estimate(value, value * 0.9, value * 1.2)}
            for (s, n), value in KL.items()
        ],
        "whole_side": [],
        "tables": [
            {"config": config("int8", "int8", layer_codecs=table), "budget_bytes_per_token": 468.0,
             "bytes_per_token": 468.0, "predicted_kl": 0.0011, "kl": 0.0013, "kl_high": 0.0016,
             "verdict": "PASS", "reason": "closest is kl", "repairs": 0},
        ],
        **more,
    }  # fmt: skip


def page_of(**more: Any) -> str:
    return render({**sample_result(), "layers": layers(**more)})


def shown(page: str, test_id: str) -> tuple[str, Any]:
    match = re.search(rf'data-testid="{re.escape(test_id)}"([^>]*)>([^<]*)<', page)
    assert match, f"{test_id} is not shown"
    value = re.search(r'data-value="([^"]*)"', match[1])
    return html.unescape(match[2]), None if value is None else json.loads(html.unescape(value[1]))


def test_each_side_shows_its_codec_its_bytes_and_what_it_adds() -> None:
    page = page_of()
    for side in layers()["sides"]:
        name = f"layers.{side['layer']}.{side['side']}"
        assert shown(page, f"{name}.codec")[0] == side["codec"]
        assert shown(page, f"{name}.bytes")[1] == side["bytes_per_token"]
    assert shown(page, "layers.1.v.kl")[1] == KL["v", 1]
    assert "468 B per token, 11.4% fewer" in page
    assert shown(page, "layers.tables.0.kl")[1] == 0.0013


def test_the_figures_name_every_side() -> None:
    page = page_of()
    for name in ("K0", "V0", "K1", "V1"):
        assert f">{name}<" in page or f">{name} " in page
    assert "layer 1, values: n4_rh, 72 B per token" in page


def test_a_search_that_found_nothing_says_so_and_one_that_was_skipped_says_why() -> None:
    assert "No table was confirmed" in page_of(is_winner=False)
    page = page_of(skipped="no time is left to measure layers", sides=[], sensitivities=[], tables=[])
    assert "Codecs were not searched by layer beyond" in page and "no time is left" in page


def test_without_a_search_by_layer_there_is_no_such_section() -> None:
    for absent in ({}, {"layers": None}):
        assert "Where the bits went" not in render({**sample_result(), **absent})


def test_markdown_has_the_same_tables() -> None:
    text = render_markdown({**sample_result(), "layers": layers()})
    assert "Where the bits went" in text and "reading the high plane" in text
    assert re.search(r"n4\\?_rh", text)


@pytest.mark.parametrize("name", ["sides", "sensitivities", "tables", "anchor", "bytes_per_token", "shown"])
@pytest.mark.parametrize("odd", [HOSTILE, None, 7, [HOSTILE], {"layer": [1], "layers": 3, "config": []}])
def test_odd_records_make_a_page_without_markup_of_theirs(name: str, odd: Any) -> None:
    page = page_of(**{name: odd})
    assert "<img" not in page and "<script" not in page.lower()
    page = page_of(**{name: [odd]})
    assert "<img" not in page


def test_a_table_with_strange_layer_numbers_is_shown_as_it_is() -> None:
    odd = config("int8", "int8", layer_codecs={HOSTILE: ["a"], "1": None})
    row = {**layers()["tables"][0], "config": odd}
    assert "<img" not in page_of(tables=[row])
