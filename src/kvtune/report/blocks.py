"""What a report is made of, before it is HTML or Markdown: sections of paragraphs, facts, tables, figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvtune.report.record import NOT_RECORDED, Figure, Place, figure, show, show_interval, show_number

Tone = Literal["", "good", "bad", "warn", "muted"]
Kind = Literal["baseline", "winner", "passed", "failed", "other"]

VERDICT_TONES: dict[str, Tone] = {"PASS": "good", "FAIL": "bad", "UNDECIDED": "warn", "INERT": "warn"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One value: its text, the recorded value behind it, a test id, a tone."""

    text: str
    raw: Any = None
    test_id: str = ""
    tone: Tone = ""
    pointer: str = ""
    """JSON pointer into the record behind the page."""


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A sentence or two; `tone` marks a warning."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Labelled values: as cards when `is_headline`, else as a two-column list."""

    items: tuple[tuple[str, Cell], ...]
    is_headline: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """One number that people act on, with what it is compared with underneath."""

    label: str
    main: Cell
    notes: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True)
class Cards:
    """Numbers side by side, the most important first."""

    items: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one of two texts; `is_changed`: not in the other one."""

    text: str
    is_changed: bool = False


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Two texts with their differences marked; `facts` say what they are of, `intro` is folded away."""

    title: Cell
    facts: tuple[tuple[str, Cell], ...]
    left_name: str
    right_name: str
    left: tuple[Piece, ...]
    right: tuple[Piece, ...]
    intro_name: str = ""
    intro: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption; a row is as many cells as there are headers, the first one its header."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of plain texts."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be copied: a command or raw JSON (`summary` folds it away)."""

    text: str
    test_id: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """One trial in a scatter figure."""

    x: float
    y: float
    label: str
    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points over two axes, with an optional horizontal limit; drawn in HTML only."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    x_unit: str = ""
    y_unit: str = ""
    limit: float | None = None
    limit_label: str = ""
    is_log_y: bool = False
    has_front: bool = False


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of an interval figure; `limit` is drawn as a tick, `tone` says how it ended."""

    label: str
    low: float
    value: float
    high: float
    tone: Tone = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Values with intervals against one vertical reference line."""

    title: str
    x_label: str
    rows: tuple[Interval, ...]
    reference: float
    reference_label: str


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a figure: (x, y) in order of x, None where nothing was seen. `look` 0 to 5 picks colour
    and dashes; `has_dots` marks single measurements."""

    name: str
    points: tuple[tuple[float, float | None], ...]
    look: int = 0
    has_dots: bool = False
    is_area: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A named place in a figure."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Lines:
    """Series over one x axis. `summary` says in a sentence what a reader should see, for those who cannot."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    summary: str
    x_unit: str = ""
    y_unit: str = ""
    is_log_x: bool = False
    is_flat: bool = False
    """A low figure, for several under one another."""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """`label` stands under the bar, where there is room; `detail` is its tooltip."""

    label: str
    value: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """Upright bars side by side, as of a histogram."""

    title: str
    x_label: str
    y_label: str
    bars: tuple[Bar, ...]
    summary: str
    y_unit: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """One upright axis of a parallel figure: `names` of a setting's values from the bottom up, or, without
    names, numbers in `unit`."""

    label: str
    names: tuple[str, ...] = ()
    unit: str = ""
    is_log: bool = False


@dataclass(frozen=True, slots=True)
class Strand:
    """One trial through all axes: a number or the index of a name per axis, None where it has none."""

    values: tuple[float | None, ...]
    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True)
class Parallel:
    """Parallel coordinates (Inselberg 1985): each trial a line through its settings and its results."""

    title: str
    axes: tuple[Axis, ...]
    strands: tuple[Strand, ...]
    summary: str


Figures = Scatter | Intervals | Lines | Bars | Parallel
Block = (
    Paragraph | Facts | Cards | Table | Bullets | Code | SideBySide
    | Scatter | Intervals | Lines | Bars | Parallel
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its blocks; figures that follow one another stand side by side."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def cell(value: Any, unit: str = "", *, test_id: str = "", tone: Tone = "") -> Cell:
    """A cell that shows a recorded value; None reads "not recorded"."""
    text = show(value, unit)
    return Cell(text, value, test_id, "muted" if text == NOT_RECORDED else tone)


def figure_cell(shown: Figure, unit: str = "", *, test_id: str = "", tone: Tone = "") -> Cell:
    """A cell with a number and, where recorded, its interval and n."""
    if shown.value is None and shown.low is None and shown.high is None:
        return Cell(NOT_RECORDED, None, test_id, "muted")
    value = "" if shown.value is None else show_number(shown.value, unit)
    interval = show_interval(shown, unit)
    count = f", n = {shown.n}" if shown.n is not None else ""
    inside = f"{interval}{count}".lstrip(", ")
    text = f"{value} ({inside})" if value and inside else value or inside
    return Cell(text, shown.value if shown.value is not None else shown.high, test_id, tone)


def verdict_cell(verdict: Any, test_id: str = "") -> Cell:
    """A verdict in its tone."""
    return cell(verdict, test_id=test_id, tone=VERDICT_TONES.get(str(verdict), ""))


def placed(place: Place, unit: str = "", *, test_id: str = "", tone: Tone = "") -> Cell:
    """A cell that shows a value of the record and knows where it stands."""
    return replace(cell(place.value, unit, test_id=test_id, tone=tone), pointer=place.pointer)


def placed_figure(place: Place, unit: str = "", *, test_id: str = "", tone: Tone = "") -> Cell:
    """A number with its interval and n, where recorded; knows where it stands."""
    shown = figure_cell(figure(place.value), unit, test_id=test_id, tone=tone)
    return replace(shown, pointer=place.pointer)
