"""Text of unknown origin, safe to show: nothing in it moves a cursor, sets a title or turns text around."""

from __future__ import annotations

import unicodedata
from typing import Final

__all__ = ["one_line", "printable"]

_KEPT: Final = frozenset("\n\t\u200c\u200d")
"""The last two are invisible, but part of how some scripts and emoji are written."""
_HIDDEN: Final = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def printable(text: str) -> str:
    """`text` with control, direction and other invisible characters as backslash escapes; line feeds and tabs
    stay."""
    if text.isprintable():
        return text
    escapes = {ord(character): _escape(character) for character in set(text) if _is_hidden(character)}
    return text.translate(escapes) if escapes else text


def one_line(text: str, limit: int = 200) -> str:
    """The same on one line of at most `limit` characters."""
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _is_hidden(character: str) -> bool:
    return character not in _KEPT and unicodedata.category(character) in _HIDDEN


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
