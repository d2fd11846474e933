"""Where prompts with text lose reuse, by comparing them with their canonical forms.

Each request is looked up twice in an endless cache of blocks: as it was sent, and in canonical form. What the
second finds and the first does not is lost. The request that put the deepest block found there is the one
whose prefix could have been shared; the first character in which the two differ is where it breaks, and
the span that covers it says why.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final

from kvtune.workload.blocks import DEFAULT_BLOCK_SIZE
from kvtune.workload.lint.document import Document, Place, head_lines
from kvtune.workload.lint.report import Finding, Position
from kvtune.workload.lint.volatile import Span, mask
from kvtune.workload.pieces import CHARACTERS_PER_TOKEN
from kvtune.workload.request import WorkloadRequest

__all__ = ["MAX_CHARACTERS", "TextLoss", "text_losses"]

MAX_CHARACTERS: Final = 128 * 2**20
"""Of text that is looked at; blocks and their names take about four times that much memory."""

_BLOCK: Final = CHARACTERS_PER_TOKEN * DEFAULT_BLOCK_SIZE
_MAX_SAMPLES: Final = 3
_MAX_SAMPLE_CHARACTERS: Final = 60
_MIN_COMMON: Final = 3
_MIN_SALTED: Final = 10


@dataclass(slots=True)
class _Group:
    """The requests that broke for one reason."""

    lost: int = 0
    places: list[Place] = field(default_factory=list[Place])
    samples: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    request_ids: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    behind: Counter[str] = field(default_factory=Counter[str])

    def finding(self, rule: str, prompt_tokens: int, max_loss: float) -> Finding:
        message, role = Counter((place.message, place.role) for place in self.places).most_common(1)[0][0]
        there = [place for place in self.places if (place.message, place.role) == (message, role)]
        share = self.lost / prompt_tokens if prompt_tokens else 0.0
        return Finding(
            rule=rule,
            level="error" if share >= max_loss else "note",
            lost_tokens=self.lost,
            lost_share=share,
            num_requests=len(self.places),
            position=Position(
                message=message,
                role=role,
                character=median_low(place.character for place in there),
                token=median_low(place.total_characters for place in there) // CHARACTERS_PER_TOKEN,
            ),
            samples=tuple(self.samples),
            request_ids=tuple(self.request_ids),
            behind=tuple(name for name, count in self.behind.most_common() if 2 * count > len(self.places)),
        )


class _Prefixes:
    """An endless cache of blocks of text that remembers which request brought each."""

    def __init__(self) -> None:
        self._creator: dict[bytes, int] = {}

    def add(self, text: str, salt: str, number: int) -> tuple[int, int]:
        """(blocks found, the request that brought the deepest of them or -1); then all are there."""
        digest = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        found, donor, is_hit = 0, -1, True
        for at in range(0, len(text), _BLOCK):
            cut = text[at : at + _BLOCK].encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(cut, key=digest, digest_size=16).digest()
            creator = self._creator.setdefault(digest, number)
            is_hit = is_hit and creator != number
            if is_hit:
                found, donor = found + 1, creator
        return found, donor


@dataclass(frozen=True, slots=True)
class TextLoss:
    """What was found in a workload's texts. Tokens are estimated as 4 characters each."""

    findings: tuple[Finding, ...]
    num_requests: int
    prompt_tokens: int
    reused_tokens: int
    lost_tokens: int


def text_losses(requests: Sequence[WorkloadRequest], *, max_loss: float) -> TextLoss:
    """Look at every request with text, up to 128 Mi characters of it."""
    chosen = list(_within_bounds(requests))
    varying = _varying_lines(chosen)
    groups: dict[str, _Group] = defaultdict(_Group)
    as_sent, canonical, unsalted = _Prefixes(), _Prefixes(), _Prefixes()
    has_own_salts = _has_own_salts(chosen)
    total = reused = 0
    for number, request in enumerate(chosen):
        document = Document(request, varying)
        text = document.text
        total += -(-len(text) // CHARACTERS_PER_TOKEN)
        hit, _ = as_sent.add(text, request.cache_salt, number)
        reused += min(len(text), hit * _BLOCK) // CHARACTERS_PER_TOKEN
        if has_own_salts:
            without, donor = unsalted.add(text, "", number)
            if without > hit:
                _note_salt(groups["cache_salt"], document, chosen[donor], _tokens(len(text), hit, without))
            continue
        could, donor = canonical.add(document.canonical, request.cache_salt, number)
        if could:
            _note_loss(groups, document, Document(chosen[donor], varying), hit, could)
    found = [group.finding(rule, total, max_loss) for rule, group in groups.items()]
    found.sort(key=lambda finding: -finding.lost_tokens)
    return TextLoss(
        findings=tuple(found),
        num_requests=len(chosen),
        prompt_tokens=total,
        reused_tokens=reused,
        lost_tokens=sum(finding.lost_tokens for finding in found),
    )


def _within_bounds(requests: Sequence[WorkloadRequest]) -> Iterator[WorkloadRequest]:
    left = MAX_CHARACTERS
    for request in requests:
        if request.has_text:
            left -= sum(len(message.content) for message in request.messages) + len(request.prompt or "")
            if left < 0:
                return
            yield request


def _has_own_salts(requests: Sequence[WorkloadRequest]) -> bool:
    salts = {request.cache_salt for request in requests}
    return len(requests) >= _MIN_SALTED and 2 * len(salts) > len(requests)


def _tokens(length: int, hit: int, could: int) -> int:
    return max(0, min(length, could * _BLOCK) - hit * _BLOCK) // CHARACTERS_PER_TOKEN


def _note_salt(group: _Group, document: Document, donor: WorkloadRequest, lost: int) -> None:
    group.lost += lost
    group.places.append(document.place(0))
    if len(group.request_ids) < _MAX_SAMPLES:
        group.request_ids.append((document.request.request_id, donor.request_id))


def _varying_lines(requests: Sequence[WorkloadRequest]) -> frozenset[str]:
    """Masked lines of heads at least twice as rare as a line that comes after them in the same head."""
    counts: Counter[str] = Counter()
    heads: Counter[tuple[str, ...]] = Counter()
    for request in requests:
        head = tuple(mask(line) for _, line in head_lines(_head(request)))
        heads[head] += 1
        counts.update(set(head))
    varying: set[str] = set()
    for head in heads:
        most = 0
        for line in reversed(head):
            if most >= _MIN_COMMON and 2 * counts[line] <= most:
                varying.add(line)
            most = max(most, counts[line])
    return frozenset(varying)


def _head(request: WorkloadRequest) -> str:
    return request.messages[0].content if request.messages else request.prompt or ""


def _note_loss(groups: dict[str, _Group], document: Document, donor: Document, hit: int, could: int) -> None:
    reach, masked = document.original_length(could * _BLOCK)
    lost = (reach - masked - hit * _BLOCK) // CHARACTERS_PER_TOKEN
    if lost < DEFAULT_BLOCK_SIZE:
        return
    at = _common_length(document.text, donor.text)
    rule, sample = _blame(document, donor, at)
    group = groups[rule]
    group.lost += lost
    group.places.append(document.place(at))
    group.behind.update(_behind(document, donor, reach) - {rule})
    if sample and sample not in group.samples and len(group.samples) < _MAX_SAMPLES:
        group.samples.append(sample)
    if len(group.request_ids) < _MAX_SAMPLES:
        group.request_ids.append((document.request.request_id, donor.request.request_id))


def _common_length(one: str, other: str) -> int:
    """Characters both begin with, by bisection (comparing slices is fast)."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _blame(document: Document, donor: Document, at: int) -> tuple[str, tuple[str, str] | None]:
    """(the rule of the span that covers the first difference, the two texts there)."""
    for name in ("ordered", "volatile", "lines"):
        mine, theirs = _span_at(getattr(document, name), at), _span_at(getattr(donor, name), at)
        span = mine or theirs
        if span is None:
            continue
        rule = span.rule
        if name == "ordered":
            rule = _order_rule(document, donor, mine or span, theirs or span)
            if rule is None:
                continue
        return rule, (_excerpt(document.text, at, mine), _excerpt(donor.text, at, theirs))
    return "unknown", (_excerpt(document.text, at, None), _excerpt(donor.text, at, None))


def _order_rule(document: Document, donor: Document, mine: Span, theirs: Span) -> str | None:
    """None where the two lists come in the same order, so that the difference lies inside an element."""
    if mine.rule == "tool_order":
        if document.masked_tools() != donor.masked_tools():
            return "tool_order"
        return None if document.raw_masked_tools() == donor.raw_masked_tools() else "json_key_order"
    same = mask(document.text[mine.start : mine.end]) == mask(donor.text[theirs.start : theirs.end])
    return None if same else mine.rule


def _span_at(spans: Sequence[Span], at: int) -> Span | None:
    return next((span for span in spans if span.start <= at <= span.end), None)


def _excerpt(text: str, at: int, span: Span | None) -> str:
    start, end = (at, at + _MAX_SAMPLE_CHARACTERS) if span is None else (span.start, span.end)
    if end - start > _MAX_SAMPLE_CHARACTERS:  # a long list: show the place where it differs
        start = max(start, at - _MAX_SAMPLE_CHARACTERS // 3)
    return text[start : min(end, start + _MAX_SAMPLE_CHARACTERS)]


def _behind(document: Document, donor: Document, reach: int) -> set[str]:
    """Rules of the masked values up to `reach` that differ. Equal canonical forms have equally many, so the
    values can be compared one by one."""
    found: set[str] = set()
    mine, theirs = (
        [span for span in d.spans if span.rule != "whitespace" and span.rule not in _IN_ORDER]
        for d in (document, donor)
    )
    for one, other in zip(mine, theirs, strict=False):
        if one.start >= reach or one.rule != other.rule:
            break
        if document.text[one.start : one.end] != donor.text[other.start : other.end]:
            found.add(one.rule)
    return found


_IN_ORDER: Final = frozenset(("tool_order", "list_order", "json_order"))
