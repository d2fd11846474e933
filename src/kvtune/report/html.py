"""A report as one HTML file: no script, no request, strict content security policy, light and dark.

Everything that comes from the result is escaped: model names, prompts and outputs are hostile text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from kvtune.printable import printable
from kvtune.report.blocks import (
    Bars,
    Block,
    Bullets,
    Cards,
    Cell,
    Code,
    Facts,
    Figures,
    Intervals,
    Lines,
    Paragraph,
    Parallel,
    Piece,
    Scatter,
    Section,
    SideBySide,
    Table,
)
from kvtune.report.charts import intervals_svg, scatter_svg
from kvtune.report.curves import bars_svg, lines_svg
from kvtune.report.decision import headline, report_title
from kvtune.report.parallel import parallel_svg
from kvtune.report.sections import sections
from kvtune.report.style import STYLE

MAX_BYTES = 2_000_000
"""A report stays under this size; the raw record is cut first."""


def render(result: Mapping[str, Any]) -> str:
    """The whole page as text, under `MAX_BYTES` for any result that `tune` writes."""
    title = report_title(result)
    return render_page(title, list(sections(result)), brand=f"kvtune report, {title}", head=headline(result))


def render_page(title: str, parts: Sequence[Section], *, brand: str = "kvtune report", head: str = "") -> str:
    """A page of these sections; over `MAX_BYTES` without the last one, which holds the raw record.

    `head`: the heading, the title unless given.
    """
    page = _page(title, parts, brand, head or title)
    return page if len(page.encode()) <= MAX_BYTES else _page(title, parts[:-1], brand, head or title)


def _page(title: str, parts: Sequence[Section], brand: str, head: str) -> str:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    contents = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in parts)
    body = "".join(_section(part) for part in parts)
    return printable(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><header><p class="brand">{escape(brand)}</p><h1>{escape(head)}</h1>'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n<main>{body}</main></body></html>\n'
    )


def _section(section: Section) -> str:
    parts: list[str] = []
    figures: list[str] = []
    for block in section.blocks:
        if isinstance(block, Figures):
            figures.append(_figure(block))
            continue
        parts += _flush(figures)
        parts.append(_block(block))
    parts += _flush(figures)
    heading = f'<h2 id="{section.anchor}">{escape(section.title)}</h2>'
    return f'<section aria-labelledby="{section.anchor}">{heading}{"".join(parts)}</section>\n'


def _flush(figures: list[str]) -> list[str]:
    drawn = "".join(figures)
    figures.clear()
    return [f'<div class="figures">{drawn}</div>'] if drawn else []


def _figure(block: Figures) -> str:
    drawing = _drawing(block)
    if not drawing:
        return ""
    wide = ' class="wide"' if isinstance(block, Parallel) else ""
    caption = f"<figcaption>{escape(block.title)}</figcaption>"
    focus = f' tabindex="0" role="region" aria-label="{escape(block.title)}"' if wide else ""
    return f'<figure{wide}>{caption}<div class="drawing"{focus}>{drawing}</div></figure>'


def _drawing(block: Figures) -> str:
    match block:
        case Scatter():
            return scatter_svg(block)
        case Intervals():
            return intervals_svg(block)
        case Lines():
            return lines_svg(block)
        case Bars():
            return bars_svg(block)
        case Parallel():
            return parallel_svg(block)


def _block(block: Block) -> str:
    if isinstance(block, Figures):
        return _figure(block)
    return _WRITERS[type(block)](block)


def _paragraph(block: Paragraph) -> str:
    return f'<p class="{block.tone or "plain"}">{escape(block.text)}</p>'


def _bullets(block: Bullets) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"


def _facts(block: Facts) -> str:
    kind = "cards" if block.is_headline else "facts"
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd{_attributes(c)}>{escape(c.text)}</dd></div>"
        for name, c in block.items
    )
    return f'<dl class="{kind}">{items}</dl>'


def _cards(block: Cards) -> str:
    items = "".join(
        f"<div><dt>{escape(card.label)}</dt><dd{_attributes(card.main)}>{escape(card.main.text)}</dd>"
        + "".join(f'<dd class="note"><span{_attributes(n)}>{escape(n.text)}</span></dd>' for n in card.notes)
        + "</div>"
        for card in block.items
    )
    return f'<dl class="cards">{items}</dl>'


def _side_by_side(block: SideBySide) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd{_attributes(c)}>{escape(c.text)}</dd></div>"
        for name, c in block.facts
    )
    intro = (
        f"<details><summary>{escape(block.intro_name)}</summary><pre>{escape(block.intro)}</pre></details>"
    )
    kind, texts = "sides", [(block.left_name, block.left, "del"), (block.right_name, block.right, "ins")]
    if block.left == block.right:
        kind, texts = "sides one", [(f"{block.left_name} and {block.right_name}: equal", block.left, "del")]
    sides = "".join(
        f"<div><h4>{escape(name)}</h4><p>{_pieces(pieces, tag)}</p></div>" for name, pieces, tag in texts
    )
    return (
        f'<article class="pair"><h3{_attributes(block.title)}>{escape(block.title.text)}</h3>'
        f'<dl class="inline">{facts}</dl>{intro if block.intro else ""}<div class="{kind}">{sides}</div>'
        "</article>"
    )


def _pieces(pieces: Sequence[Piece], tag: str) -> str:
    return "".join(f"<{tag}>{escape(p.text)}</{tag}>" if p.is_changed else escape(p.text) for p in pieces)


def _table(block: Table) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in block.headers)
    rows: list[str] = []
    for row in block.rows:
        first, *rest = row
        cells = "".join(f"<td{_attributes(c)}>{escape(c.text)}</td>" for c in rest)
        rows.append(f'<tr><th scope="row"{_attributes(first)}>{escape(first.text)}</th>{cells}</tr>')
    name = escape(block.caption)
    return (
        f'<p class="caption" aria-hidden="true">{name}</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{name}"><table aria-label="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _attributes(shown: Cell) -> str:
    """Test id, the recorded value behind the text, and the tone's class."""
    parts: list[str] = []
    if shown.test_id:
        parts.append(f' data-testid="{escape(shown.test_id)}"')
        if isinstance(shown.raw, bool | int | float | str):
            parts.append(f' data-value="{escape(json.dumps(shown.raw))}"')
    if shown.pointer:
        parts.append(f' data-path="{escape(shown.pointer)}"')
    if shown.tone:
        parts.append(f' class="{shown.tone}"')
    return "".join(parts)


def _code(block: Code) -> str:
    test_id = f' data-testid="{escape(block.test_id)}"' if block.test_id else ""
    pre = f"<pre{test_id}><code>{escape(block.text)}</code></pre>"
    if not block.summary:
        return pre
    return f"<details><summary>{escape(block.summary)}</summary>{pre}</details>"


_WRITERS: Mapping[type, Callable[[Any], str]] = {
    Paragraph: _paragraph,
    Facts: _facts,
    Cards: _cards,
    SideBySide: _side_by_side,
    Table: _table,
    Bullets: _bullets,
    Code: _code,
}
