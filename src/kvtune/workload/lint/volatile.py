"""What changes from request to request by nature: times, identifiers, counters, stray white space.

One pass of one regular expression finds them; every alternative is bounded, so that hostile text costs time
proportional to its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["PLACEHOLDER", "Span", "mask", "volatile_spans"]

PLACEHOLDER: Final = "\x00{}\x00"
"""Stands for a value of a kind; NUL is in no prompt a server takes."""

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}\.?"
_DAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?\b"
_CLOCK = (
    r"\d{1,2}:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?: ?[AaPp]\.?[Mm]\b\.?)?"
    r"(?: ?(?:Z\b|UTC\b|GMT\b|[+-]\d\d:?\d\d))?"
)
_DATE = (
    rf"\d{{4}}[-/.]\d\d?[-/.]\d\d?|\d\d?[./]\d\d?[./]\d{{4}}|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH},? \d{{4}}"
)
_VOLATILE: Final = re.compile(
    r"(?P<uuid>\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b)"
    rf"|(?P<timestamp>(?:{_DAY},? )?(?:{_DATE})(?:(?:T|,? (?:at )?){_CLOCK})?|\b{_CLOCK}|\b{_DAY}"
    r"|\b1[0-9]{9}(?:\.\d{1,9}|\d{3}|\d{6}|\d{9})?\b)"
    r"|(?P<request_id>\b(?i:req|request|trace|span|session|sess|run|msg|call|chatcmpl|thread|resp|conv|user|nonce)"
    r"[-_ ]?(?i:id)?(?:[=:#]|[-_]) ?(?=[A-Za-z._-]{0,64}\d)[A-Za-z0-9._-]{4,128}"
    r"|\b(?=[0-9a-f]{0,32}[0-9])(?=[0-9]{0,64}[a-f])[0-9a-f]{12,128}\b"
    r"|\b(?=[A-Za-z]{0,64}[0-9])(?=[0-9A-Z_-]{0,64}[a-z])(?=[0-9a-z_-]{0,64}[A-Z])[A-Za-z0-9_-]{20,128}\b)"
    r"|(?P<number>\d{1,64}(?:[.,]\d{1,64})?)"
    r"|(?P<whitespace>\r\n?|[ \t\u00a0\u2000-\u200b\u202f\u3000\ufeff]{2,}|[\t\u00a0\u200b\u202f\ufeff]"
    r"|[ \t]{1,}(?=\n|\Z)|\n{3,})"
)
"""The kinds, in order of preference where two begin at the same place."""

_NEWLINES: Final = frozenset(("\r", "\r\n"))


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text that stand for something else in its canonical form."""

    start: int
    end: int
    replacement: str
    rule: str


def volatile_spans(text: str, *, offset: int = 0) -> Iterator[Span]:
    """The volatile places of a text in order, moved by `offset`."""
    for match in _VOLATILE.finditer(text):
        rule = match.lastgroup or ""
        replacement = _plain(match[0]) if rule == "whitespace" else PLACEHOLDER.format(rule)
        if replacement != match[0]:
            yield Span(match.start() + offset, match.end() + offset, replacement, rule)


def mask(text: str) -> str:
    """The text with every volatile place replaced."""
    return _VOLATILE.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    rule = match.lastgroup or ""
    return _plain(match[0]) if rule == "whitespace" else PLACEHOLDER.format(rule)


def _plain(blank: str) -> str:
    """What careful software would have written: one blank, one line end, one empty line, nothing before a
    line end."""
    if blank in _NEWLINES:
        return "\n"
    if blank.startswith("\n"):
        return "\n\n"
    return " "
