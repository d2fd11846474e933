"""What the linter answers, and what to do about each thing it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

__all__ = ["RULES", "Finding", "LintReport", "Position", "Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What breaks a prefix, in words, and what to change."""

    title: str
    fix: str


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "timestamp": Rule(
            "a date or time changes",
            "move it behind everything that stays the same (the last message), or round it to the day",
        ),
        "uuid": Rule("a UUID changes", "leave it out of the prompt: send it as metadata, or put it last"),
        "request_id": Rule(
            "an identifier changes",
            "leave request, trace and session identifiers out of the prompt, or put them last",
        ),
        "number": Rule("a number changes", "move counters and measured values behind the text that stays"),
        "whitespace": Rule(
            "white space differs",
            "build prompts from one template: one kind of line end, no blanks at line ends, no tabs",
        ),
        "tool_order": Rule("the tools come in another order", "sort tools by name before each request"),
        "json_key_order": Rule(
            "keys of JSON come in another order", "serialise with sorted keys (sort_keys=True)"
        ),
        "json_order": Rule(
            "elements or keys of JSON come in another order",
            "sort the elements by a stable key and serialise with sorted keys (sort_keys=True)",
        ),
        "list_order": Rule("a list comes in another order", "sort the list by a stable key"),
        "varying_line": Rule(
            "a line that changes stands before lines that do not",
            "move what belongs to the user or the request behind the common instructions",
        ),
        "cache_salt": Rule(
            "nearly every request has a cache salt of its own",
            "use one salt per tenant: prompts of different salts never share a block",
        ),
        "moved_content": Rule(
            "content seen before comes back behind a different prefix",
            "put chunks in a fixed order, those shared by most requests first",
        ),
        "changing_head": Rule(
            "turns of one session part at the same early place",
            "look at the tokens named: something in them changes from turn to turn",
        ),
        "rewritten_history": Rule(
            "turns of one session do not continue the turn before",
            "append to the history instead of rewriting it: keep tool results and earlier turns as they were",
        ),
        "unknown": Rule(
            "prompts that are alike part here",
            "compare the requests named: their texts differ although their templates do not",
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where the prefix breaks, as a median over the requests. `message` counts from 0, -1 is the list of
    tools, None where only hashes are known; `character` counts in that message, `token` in the prompt."""

    message: int | None
    role: str | None
    character: int | None
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One cause. `level`: error where it loses at least the tolerated share of prompt tokens, else note.

    `lost_tokens`: reuse that an endless cache would give if this (and what is in `behind`, found further on
    in the same prompts) were mended. `samples`: pairs of values that differ; `request_ids`: requests to look
    at, each pair the one that lost and the one it could have shared with.
    """

    rule: str
    level: str
    lost_tokens: int
    lost_share: float
    num_requests: int
    position: Position
    samples: tuple[tuple[str, str], ...] = ()
    request_ids: tuple[tuple[str, str], ...] = ()
    behind: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return found | {
            "title": RULES[self.rule].title,
            "fix": RULES[self.rule].fix,
            "samples": [list(pair) for pair in self.samples],
            "request_ids": [list(pair) for pair in self.request_ids],
            "behind": list(self.behind),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LintReport:
    """`evidence`: text, tokens or hashes. Tokens of text are estimated (`is_estimated`).

    `reused_tokens`: what an endless cache reuses of the prompts as they are; `lost_tokens`: what it would
    reuse beyond that if all findings were mended.
    """

    evidence: str
    is_estimated: bool
    num_requests: int
    prompt_tokens: int
    reused_tokens: int
    lost_tokens: int
    max_loss: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def lost_share(self) -> float:
        return self.lost_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def is_clean(self) -> bool:
        """No finding is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": "clean" if self.is_clean else "broken",
            "evidence": self.evidence,
            "is_estimated": self.is_estimated,
            "num_requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "lost_tokens": self.lost_tokens,
            "lost_share": self.lost_share,
            "max_loss": self.max_loss,
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": list(self.notes),
        }
