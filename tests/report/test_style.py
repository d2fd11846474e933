"""Colours of the pages: enough contrast in light and dark, by WCAG 2.2."""

from __future__ import annotations

import re

import pytest

from kvtune.report.style import STYLE

TEXT = ("ink", "soft", "link", "good", "bad", "warn")
MARKS = ("mark", "passed", "failed", "other", "winner-edge")
AA_TEXT, AA_GRAPHICS = 4.5, 3.0
"""Success criteria 1.4.3 and 1.4.11."""


def palette(scheme: str) -> dict[str, str]:
    """Custom properties of the scheme, short hexadecimal colours written out."""
    light, dark = re.findall(r":root\{([^}]*)\}", STYLE)
    pairs = re.findall(r"--([\w-]+):\s*#([0-9a-f]{3,6})", light if scheme == "light" else dark)
    return {name: value if len(value) == 6 else "".join(2 * c for c in value) for name, value in pairs}


def luminance(colour: str) -> float:
    shares = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_contrast_that_the_standard_says() -> None:
    assert contrast("000000", "ffffff") == pytest.approx(21)
    assert contrast("777777", "ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ground", ["bg", "panel"])
@pytest.mark.parametrize("name", TEXT)
def test_text_can_be_read_on_every_ground(scheme: str, ground: str, name: str) -> None:
    colours = palette(scheme)
    assert contrast(colours[name], colours[ground]) >= AA_TEXT


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", MARKS)
def test_lines_and_markers_of_figures_stand_out(scheme: str, name: str) -> None:
    colours = palette(scheme)
    assert contrast(colours[name], colours["panel"]) >= AA_GRAPHICS


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ground", ["del", "ins"])
def test_marked_differences_can_be_read(scheme: str, ground: str) -> None:
    colours = palette(scheme)
    assert contrast(colours["ink"], colours[ground]) >= AA_TEXT
