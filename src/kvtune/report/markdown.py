"""A report as Markdown, for terminals and issues; figures are left to the tables beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvtune.printable import printable
from kvtune.report.blocks import (
    Block,
    Bullets,
    Cards,
    Code,
    Facts,
    Figures,
    Paragraph,
    Piece,
    Section,
    SideBySide,
    Table,
)
from kvtune.report.decision import headline, report_title
from kvtune.report.sections import sections

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!])")


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same sections as the page, without figures and without the raw record."""
    parts = [f"# {_plain(headline(result))}", _plain(report_title(result))]
    parts += [_section(section) for section in sections(result)[:-1]]
    return printable("\n\n".join(parts) + "\n")


def _section(section: Section) -> str:
    shown = (_block(block) for block in section.blocks)
    return "\n\n".join([f"## {_plain(section.title)}", *(text for text in shown if text)])


def _block(block: Block) -> str:
    """Figures are left to the tables beside them."""
    if isinstance(block, Figures):
        return ""
    return _WRITERS[type(block)](block)


def _paragraph(block: Paragraph) -> str:
    return _plain(block.text)


def _facts(block: Facts) -> str:
    return "\n".join(f"- **{_plain(name)}:** {_plain(shown.text)}" for name, shown in block.items)


def _cards(block: Cards) -> str:
    return "\n".join(
        f"- **{_plain(card.label)}:** " + "; ".join(_plain(shown.text) for shown in (card.main, *card.notes))
        for card in block.items
    )


def _bullets(block: Bullets) -> str:
    return "\n".join(f"- {_plain(item)}" for item in block.items)


def _code(block: Code) -> str:
    return _fenced(block.text)


def _side_by_side(block: SideBySide) -> str:
    """Both texts as code: what is in them is nobody's markup."""
    facts = "; ".join(f"{_plain(name)} {_plain(shown.text)}" for name, shown in block.facts)
    if block.left == block.right:
        both = f"{_plain(block.left_name)} and {_plain(block.right_name)}, equal:"
        return "\n\n".join([f"### {_plain(block.title.text)}", facts, both, _fenced(_text(block.left))])
    return "\n\n".join(
        [
            f"### {_plain(block.title.text)}", facts,
            _plain(block.left_name) + ":", _fenced(_text(block.left)),
            _plain(block.right_name) + ":", _fenced(_text(block.right)),
        ]
    )  # fmt: skip


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


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


_WRITERS: Mapping[type, Callable[[Any], str]] = {
    Paragraph: _paragraph,
    Facts: _facts,
    Cards: _cards,
    SideBySide: _side_by_side,
    Table: _table,
    Bullets: _bullets,
    Code: _code,
}
