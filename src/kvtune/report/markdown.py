"""A report as Markdown, for terminals and issues; figures are left to the tables beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kvtune.printable import printable
from kvtune.report.blocks import (
    Bars,
    Block,
    Bullets,
    Code,
    Facts,
    Intervals,
    Lines,
    Paragraph,
    Scatter,
    Section,
    Table,
)
from kvtune.report.sections import report_title, sections

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!])")


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same sections as the page, without figures and without the raw record."""
    parts = [f"# {_plain(report_title(result))}"]
    parts += [_section(section) for section in sections(result)[:-1]]
    return printable("\n\n".join(parts) + "\n")


def _section(section: Section) -> str:
    shown = (_block(block) for block in section.blocks)
    return "\n\n".join([f"## {_plain(section.title)}", *(text for text in shown if text)])


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return _plain(block.text)
        case Facts():
            return "\n".join(f"- **{_plain(name)}:** {_plain(shown.text)}" for name, shown in block.items)
        case Table():
            return _table(block)
        case Bullets():
            return "\n".join(f"- {_plain(item)}" for item in block.items)
        case Code():
            return _fenced(block.text)
        case Scatter() | Intervals() | Lines() | Bars():
            return ""


def _table(block: Table) -> str:
    lines = [
        f"*{_plain(block.caption)}*",
        "",
        _row([_plain(header) for header in block.headers]),
        _row(["---"] * len(block.headers)),
    ]
    lines += [_row([_plain(shown.text) for shown in row]) for row in block.rows]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """Text on one line that Markdown and HTML inside it cannot change."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _fenced(text: str) -> str:
    """A code fence longer than any run of backquotes inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
