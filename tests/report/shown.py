"""What a page shows, and whether each number of it stands in the JSON behind it, where the page says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from kvtune.printable import printable

UNITS = {"ms": 1e3, "s": 1.0, "B": 1.0, "KiB": 2.0**-10, "MiB": 2.0**-20, "GiB": 2.0**-30, "TiB": 2.0**-40}
_DIGITS = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
NUMBER = re.compile(rf"(?<![\w.,]){_DIGITS}(?=x\b)|(?<![\w.,]){_DIGITS}(?![\d.]*[\w/])")
UNIT = re.compile(r"\s?(ms|s|[KMGT]iB|B|%)(?!\w)")
DERIVED = ("0, every bit equal", "% off")
"""Cells that say something of numbers beside them instead of repeating one."""


def numbers_in(text: str) -> Iterator[tuple[str, str]]:
    """(digits, unit) of every number in a text."""
    for match in NUMBER.finditer(text):
        unit = UNIT.match(text, match.end())
        yield match[0], unit[1] if unit else ""


def leaves(value: Any) -> Iterator[float | str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield value


def is_shown_by(digits: str, unit: str, text: str, value: Any) -> bool:
    """Whether some number under `value`, in that unit and rounded to as many digits, is what stands there."""
    plain = digits.replace(",", "")
    shown, decimals = float(plain), len(plain.partition("e")[0].partition(".")[2])
    step = 0.5 * 10.0 ** (int(plain.partition("e")[2] or 0) - decimals)
    for leaf in leaves(value):
        if isinstance(leaf, str):
            if digits in leaf:
                return True
            continue
        scaled = leaf * UNITS.get(unit, 1.0)
        if unit == "%":
            scaled = abs(1 - leaf) * 100 if "fewer" in text or "more" in text else leaf * 100
        whole = int(leaf) if not unit and "." not in plain else scaled
        if abs(shown - scaled) <= 1.001 * step or shown == whole:
            return True
    return False


class Shown(HTMLParser):
    """What a page shows: (text, JSON pointer, recorded value, test id, tag) of each marked element, and the
    text of all other cells and paragraphs."""

    MARKED = ("td", "th", "dd", "span", "h3")

    def __init__(self, dom: str) -> None:
        super().__init__(convert_charrefs=True)
        self.marked: list[dict[str, Any]] = []
        self.bare: list[tuple[str, str]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in (*self.MARKED, "p", "svg"):
            self._open.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self._open and not any(tag == "svg" for tag, _, _ in self._open):
            self._open[-1][2].append(data)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            return
        _, attributes, texts = self._open.pop()
        text = "".join(texts)
        if "data-path" in attributes:
            value = attributes.get("data-value")
            self.marked.append({
                "text": text, "pointer": attributes["data-path"], "test_id": attributes.get("data-testid"),
                "value": None if value is None else json.loads(value), "tag": tag,
            })  # fmt: skip
        elif tag in self.MARKED and text:
            self.bare.append((tag, text))


def resolve(record: Any, pointer: str) -> Any:
    """The value that a JSON pointer leads to; None where it leads nowhere."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(record, list):
            record = record[int(key)]
        else:
            record = record.get(key) if isinstance(record, dict) else None
    return record


def check_numbers(shown: Shown, record: Any) -> int:
    """Hold every marked element against the record; how many numbers were held."""
    checked = 0
    for element in shown.marked:
        value = resolve(record, element["pointer"])
        text, where = element["text"], f"{element['pointer']}: {element['text']!r}"
        if value is None:
            assert text in ("not recorded", "none"), where
            continue
        if element["value"] is not None:
            assert element["value"] == value or element["value"] in list(leaves(value)), where
        if isinstance(value, str):
            cut = text.endswith("...") and text[:-3] in printable(value)
            assert cut or value == "" or printable(value) in text, where
            continue
        for digits, unit in numbers_in(text):
            checked += 1
            assert is_shown_by(digits, unit, text, value), where
    return checked


def orphans(shown: Shown) -> list[str]:
    """Cells with a number and no place in the record."""
    return [
        text for tag, text in shown.bare
        if tag in ("td", "dd", "span") and list(numbers_in(text)) and not any(d in text for d in DERIVED)
    ]  # fmt: skip
