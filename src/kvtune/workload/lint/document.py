"""A request's text, and its canonical form: volatile values masked, lists in a fixed order.

Two requests that would share a prefix, were they written with care, have canonical forms that share one.
Every difference between the two forms is a span, so that a place in one can be found in the other.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, cast

from kvtune.workload.lint.volatile import PLACEHOLDER, Span, mask, volatile_spans
from kvtune.workload.request import WorkloadRequest, transcript

__all__ = ["Document", "Place", "head_lines"]

_ITEM: Final = re.compile(r"^[ \t]{0,16}(?:[-*\u2022]|\d{1,4}[.)])[ \t]+\S.*$", re.MULTILINE)
_MARKER: Final = re.compile(r"^[ \t]{0,16}(?:[-*\u2022]|\d{1,4}[.)])[ \t]+")
_JSON_START: Final = re.compile(r"\[\s{0,64}\{\s{0,64}\"|\{\s{0,64}\"")
_MAX_JSON_CHARACTERS: Final = 200_000
_MAX_JSON_VALUES: Final = 256
_DECODER: Final = json.JSONDecoder()
_MASKED_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a request: message index (-1: the tools), role, character in the message, in the whole."""

    message: int
    role: str
    character: int
    total_characters: int


class Document:
    """One request with text. `varying`: masked lines of the head that are to be masked as a whole."""

    def __init__(self, request: WorkloadRequest, varying: frozenset[str] = frozenset()) -> None:
        self.request = request
        self.text = transcript(request)
        self._varying = varying

    @cached_property
    def parts(self) -> list[tuple[int, int, str, int]]:
        """(start, end, role, message index) of every content in `text`."""
        if not self.request.messages:
            return [(0, len(self.text), "prompt", 0)]
        at = sum(len(tool) + 1 for tool in self.request.tools)
        found: list[tuple[int, int, str, int]] = []
        for index, message in enumerate(self.request.messages):
            start = at + len(message.role) + 1
            found.append((start, start + len(message.content), message.role, index))
            at = start + len(message.content) + 1
        return found

    @cached_property
    def volatile(self) -> list[Span]:
        """Every volatile place, also inside of lists that are put in order."""
        spans: list[Span] = []
        at = 0
        for tool in self.request.tools if self.request.messages else ():
            spans += volatile_spans(tool, offset=at)
            at += len(tool) + 1
        for start, end, _, _ in self.parts:
            spans += volatile_spans(self.text[start:end], offset=start)
        return spans

    @cached_property
    def ordered(self) -> list[Span]:
        """The lists of the head (tools, bullet points, JSON) that are not in canonical order."""
        start, end, _, _ = self.parts[0]
        spans = [*self._tools_span(), *_json_spans(self.text[start:end], start)]
        inside = _Cover(spans)
        spans += (span for span in _item_spans(self.text[start:end], start) if not inside.touches(span))
        return sorted(spans, key=lambda span: span.start)

    @cached_property
    def lines(self) -> list[Span]:
        """The head's varying lines."""
        start, end, _, _ = self.parts[0]
        spans: list[Span] = []
        for line_start, line in head_lines(self.text[start:end]):
            if mask(line) in self._varying:
                at = start + line_start
                spans.append(Span(at, at + len(line), PLACEHOLDER.format("line"), "varying_line"))
        masked = sum(span.end - span.start for span in spans)
        return spans if masked <= _MASKED_SHARE * (end - start) else []

    @cached_property
    def spans(self) -> list[Span]:
        """All differences to the canonical form: whole lines before lists before single values."""
        chosen = list(self.lines)
        for more in (self.ordered, self.volatile):
            cover = _Cover(chosen)
            chosen += [span for span in more if not cover.touches(span)]
        return sorted(chosen, key=lambda span: span.start)

    @cached_property
    def canonical(self) -> str:
        pieces: list[str] = []
        at = 0
        for span in self.spans:
            pieces += (self.text[at : span.start], span.replacement)
            at = span.end
        pieces.append(self.text[at:])
        return "".join(pieces)

    def original_length(self, canonical_length: int) -> tuple[int, int]:
        """(characters of `text` that the first so many canonical ones stand for, those of them that stand
        for a masked value and would have to be computed anyhow)."""
        at = canonical_at = masked = 0
        for span in self.spans:
            if canonical_at + span.start - at >= canonical_length:
                break
            canonical_at += span.start - at + len(span.replacement)
            at = span.end
            if "\x00" in span.replacement and span.rule not in _ORDER_RULES:
                masked += span.end - span.start
        else:
            return min(len(self.text), at + canonical_length - canonical_at), masked
        return at + max(0, canonical_length - canonical_at), masked

    def place(self, at: int) -> Place:
        """Which message a character is in; role headers belong to the message they open."""
        for start, end, role, index in self.parts:
            if at <= end:
                if index == 0 and self.request.tools and at < start - len(role) - 1:
                    break
                return Place(index, role, max(0, at - start), at)
        if self.request.tools and at < self.parts[0][0]:
            return Place(-1, "tools", at, at)
        start, end, role, index = self.parts[-1]
        return Place(index, role, end - start, at)

    def masked_tools(self) -> list[str]:
        """Each tool with its values masked and its keys sorted, in the order sent."""
        return [mask(_sorted_keys(tool)) for tool in self.request.tools]

    def raw_masked_tools(self) -> list[str]:
        """The same with the keys as sent."""
        return [mask(tool) for tool in self.request.tools]

    def _tools_span(self) -> Iterator[Span]:
        if not self.request.messages or not self.request.tools:
            return
        whole = "".join(f"{tool}\n" for tool in self.request.tools)
        canonical = "".join(f"{tool}\n" for tool in sorted(mask(_sorted_keys(t)) for t in self.request.tools))
        if canonical != "".join(f"{mask(tool)}\n" for tool in self.request.tools):
            yield Span(0, len(whole), canonical, "tool_order")


def head_lines(head: str) -> Iterator[tuple[int, str]]:
    """(offset, line without its end) of every line of a head that holds something."""
    at = 0
    for line in head.split("\n"):
        if line.strip():
            yield at, line
        at += len(line) + 1


_ORDER_RULES: Final = frozenset(("tool_order", "list_order", "json_order"))


class _Cover:
    """Whether a span touches one of some spans that do not overlap each other."""

    def __init__(self, spans: Sequence[Span]) -> None:
        ordered = sorted(spans, key=lambda span: span.start)
        self._starts = [span.start for span in ordered]
        self._ends = [span.end for span in ordered]

    def touches(self, span: Span) -> bool:
        place = bisect.bisect_left(self._starts, span.end) - 1
        return place >= 0 and self._ends[place] > span.start


def _sorted_keys(text: str) -> str:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _json_spans(text: str, offset: int) -> Iterator[Span]:
    """JSON lists of objects, and objects, whose elements or keys are in another than the sorted order."""
    at = 0
    for _ in range(_MAX_JSON_VALUES):
        match = _JSON_START.search(text, at)
        if match is None:
            return
        try:
            value, length = _DECODER.raw_decode(text[match.start() : match.start() + _MAX_JSON_CHARACTERS])
        except (ValueError, RecursionError):
            at = match.end()
            continue
        start, at = match.start(), match.start() + length
        canonical = _canonical_json(value)
        if canonical is not None and canonical != _as_sent(value):
            yield Span(start + offset, at + offset, canonical, "json_order")


def _canonical_json(value: Any) -> str | None:
    if isinstance(value, list):
        elements = cast("list[Any]", value)
        return "\n".join(sorted(mask(json.dumps(element, sort_keys=True)) for element in elements))
    return mask(json.dumps(value, sort_keys=True)) if isinstance(value, dict) else None


def _as_sent(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(mask(json.dumps(element)) for element in cast("list[Any]", value))
    return mask(json.dumps(value))


def _item_spans(text: str, offset: int) -> Iterator[Span]:
    """Runs of bullet points, or numbered ones, that are not sorted by what they say."""
    run: list[re.Match[str]] = []
    for match in _ITEM.finditer(text):
        if run and match.start() != run[-1].end() + 1:
            yield from _item_span(run, offset)
            run = []
        run.append(match)
    yield from _item_span(run, offset)


def _item_span(run: Sequence[re.Match[str]], offset: int) -> Iterator[Span]:
    if len(run) < 2:
        return
    said = [mask(_MARKER.sub("", match[0])) for match in run]
    if said != sorted(said):
        canonical = "\n".join(sorted(said))
        yield Span(run[0].start() + offset, run[-1].end() + offset, canonical, "list_order")
