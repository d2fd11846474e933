"""Why prompts that look alike share no prefix: which place breaks, what it costs, what to change."""

from __future__ import annotations

from typing import Final

from kvtune.errors import UsageError
from kvtune.workload.blocks import BlockTrace, block_trace, has_content
from kvtune.workload.lint.hashes import content_finding, first_block_note, session_finding
from kvtune.workload.lint.report import RULES, Finding, LintReport, Position
from kvtune.workload.lint.text import TextLoss, text_losses
from kvtune.workload.request import Workload
from kvtune.workload.reuse import is_seen_before

__all__ = ["DEFAULT_MAX_LOSS", "RULES", "Finding", "LintReport", "Position", "lint_workload"]

DEFAULT_MAX_LOSS: Final = 0.01


def lint_workload(workload: Workload, *, max_loss: float = DEFAULT_MAX_LOSS) -> LintReport:
    """Look for what breaks prefixes. `max_loss`: the share of prompt tokens a cause may lose before it is an
    error; smaller losses are notes.

    Text says why; token ids and hashes say where, and only where it is certain. Raises UsageError for a share
    outside [0, 1] and for a workload that holds lengths only.
    """
    if not 0 <= max_loss <= 1:
        raise UsageError(f"the tolerated loss is a share of the prompt tokens, 0 to 1, found {max_loss:g}")
    if not any(has_content(request) for request in workload.requests):
        raise UsageError(
            f"{workload.path or 'this workload'} holds lengths only; to find what breaks prefixes takes "
            "text, token ids or block hashes"
        )
    if any(request.has_text for request in workload.requests):
        return _of_text(workload, text_losses(workload.requests, max_loss=max_loss), max_loss)
    return _of_hashes(workload, max_loss)


def _of_text(workload: Workload, losses: TextLoss, max_loss: float) -> LintReport:
    skipped = len(workload.requests) - losses.num_requests
    notes = ["tokens are estimated as 4 characters each"]
    if skipped:
        notes.append(f"{skipped} requests without text, or beyond the first 128 Mi characters, left out")
    return LintReport(
        evidence="text",
        is_estimated=True,
        num_requests=losses.num_requests,
        prompt_tokens=losses.prompt_tokens,
        reused_tokens=losses.reused_tokens,
        lost_tokens=losses.lost_tokens,
        max_loss=max_loss,
        findings=losses.findings,
        notes=tuple(notes),
    )


def _of_hashes(workload: Workload, max_loss: float) -> LintReport:
    trace = block_trace(workload)
    prompt_tokens = int(trace.prompt_tokens.sum())
    moved, notes = content_finding(workload.requests, prompt_tokens, max_loss=max_loss)
    turns = None if moved else session_finding(workload.requests, trace, max_loss=max_loss)
    findings = tuple(finding for finding in (moved, turns) if finding is not None)
    return LintReport(
        evidence="tokens" if workload.requests[0].token_ids is not None else "hashes",
        is_estimated=False,
        num_requests=len(workload.requests),
        prompt_tokens=prompt_tokens,
        reused_tokens=int(trace.block_tokens[is_seen_before(trace)].sum()),
        lost_tokens=sum(finding.lost_tokens for finding in findings),
        max_loss=max_loss,
        findings=findings,
        notes=(*notes, *_limits(workload, trace)),
    )


def _limits(workload: Workload, trace: BlockTrace) -> list[str]:
    """What cannot be told without text."""
    notes = ["there is no text: which characters change, and why, cannot be told"]
    if not any(request.session_id for request in workload.requests):
        notes.append("the trace names no sessions, so turns that should continue each other are not known")
    first = first_block_note(trace)
    return notes if first is None else [*notes, first]
