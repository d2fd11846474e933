"""Right-or-wrong answers in a report: probes by stratum, high-value requests, and what was not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report.blocks import Block, Bullets, Paragraph, Table, cell
from kvtune.report.record import as_mapping, as_sequence, number, show

__all__ = ["answer_blocks", "limit_blocks"]

MAX_ANSWERS = 20
MAX_TEXT = 400
"""Characters of an answer shown; the record holds all of it."""


def answer_blocks(quality: Mapping[str, Any]) -> tuple[Block, ...]:
    """Tables of `quality.probes` and `quality.answers`; none where the record has neither."""
    return (*_probes(as_mapping(quality.get("probes"))), *_answers(as_mapping(quality.get("answers"))))


def limit_blocks(quality: Mapping[str, Any]) -> tuple[Block, ...]:
    """What the verdict cannot see, from `quality.cannot_see`."""
    spots = tuple(str(spot) for spot in as_sequence(quality.get("cannot_see")))
    return (Paragraph("This verdict cannot see:"), Bullets(spots)) if spots else ()


def _probes(probes: Mapping[str, Any]) -> tuple[Block, ...]:
    rows = tuple(
        (
            cell(f"{show(entry.get('stratum'))}: {show(entry.get('value'))}"),
            *(cell(number(entry.get(k))) for k in ("num_questions", "reference_solved", "lost", "gained")),
        )
        for entry in (as_mapping(item) for item in as_sequence(probes.get("strata")))
    )
    if not rows:
        return ()
    caption = (
        f"Probes: {show(probes.get('num_questions'))} questions with known answers in "
        f"{show(probes.get('num_contexts'))} contexts; lost {show(probes.get('lost'))}, "
        f"gained {show(probes.get('gained'))}"
    )
    table = Table(caption, ("Stratum", "Questions", "Baseline right", "Lost", "Gained"), rows)
    left_out = [as_mapping(item) for item in as_sequence(probes.get("left_out"))]
    if not left_out:
        return (table,)
    named = ", ".join(
        f"{show(t.get('task'))} ({show(t.get('solved'))} of {show(t.get('num_questions'))})" for t in left_out
    )
    return (table, Paragraph(f"Left out, since the baseline hardly solves them: {named}.", "muted"))


def _answers(answers: Mapping[str, Any]) -> tuple[Block, ...]:
    rows = tuple(
        (cell(entry.get("request_id")), cell(entry.get("status")), _text(entry.get("baseline_answer")),
         _text(entry.get("candidate_answer")))
        for entry in (as_mapping(i) for i in as_sequence(answers.get("requests"))[:MAX_ANSWERS])
    )  # fmt: skip
    if not rows:
        return ()
    by = show(answers.get("checker")) if answers.get("checker") else "equality"
    caption = f"Whole answers of {show(answers.get('num_requests'))} requests, judged by {by}"
    return (Table(caption, ("Request", "Status", "Baseline", "Candidate"), rows),)


def _text(answer: Any) -> Any:
    text = show(answer)
    return cell(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}...")
