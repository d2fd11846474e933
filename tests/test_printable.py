from __future__ import annotations

import pytest

from kvtune.printable import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, \u00e4\u6f22 \U0001f9ea", None), ("two\nlines\tand a tab", None),
        ("\U0001f469\u200d\U0001f467", None),  # a joined emoji
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"), ("a\rb\x08c\x7f", "a\\rb\\x08c\\x7f"),
        ("\x9b31m", "\\x9b31m"), ("exe.\u202etxt", "exe.\\u202etxt"),
        ("\u2066\u2069\u200e", "\\u2066\\u2069\\u200e"),
        ("\ufeff\u200b", "\\ufeff\\u200b"), ("\u2028", "\\u2028"), ("\ud83d", "\\ud83d"),
        ("\U000e0041", "\\U000e0041"),
    ],
)  # fmt: skip
def test_what_would_steer_a_terminal_or_hide_is_shown_as_an_escape(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)
    printable(text).encode()  # nothing is left that UTF-8 cannot hold


def test_a_megabyte_becomes_one_short_line() -> None:
    line = one_line("x\n\x1b[31m" * 200_000, 100)
    assert len(line) == 100 and line.endswith("...") and "\n" not in line and "\x1b" not in line
