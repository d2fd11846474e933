"""Right-or-wrong answers in a report: probes by stratum, high-value requests, and what was not seen."""

from __future__ import annotations

from kvtune.report.blocks import Block, Bullets, Cell, Paragraph, Table, Tone, placed
from kvtune.report.record import Place, as_mapping, as_sequence, show

__all__ = ["answer_blocks", "limit_blocks"]

MAX_ANSWERS = 20
MAX_TEXT = 400
"""Characters of an answer shown; the record holds all of it."""


def answer_blocks(quality: Place) -> tuple[Block, ...]:
    """Tables of `quality.probes` and `quality.answers`; none where the record has neither."""
    return (*_probes(quality.at("probes")), *_answers(quality.at("answers")))


def limit_blocks(quality: Place) -> tuple[Block, ...]:
    """What the verdict cannot see, from `quality.cannot_see`."""
    spots = tuple(str(spot) for spot in as_sequence(quality.at("cannot_see").value))
    return (Paragraph("This verdict cannot see:"), Bullets(spots)) if spots else ()


def _probes(probes: Place) -> tuple[Block, ...]:
    counts = ("num_questions", "reference_solved", "lost", "gained")
    rows = tuple(
        (
            Cell(f"{show(p.at('stratum').value)}: {show(p.at('value').value)}", pointer=p.pointer),
            *(placed(p.at(key)) for key in counts),
        )
        for p in probes.at("strata").elements()
    )
    if not rows:
        return ()
    fields = as_mapping(probes.value)
    whole = (
        Cell("all"), *(placed(probes.at(key), test_id=f"probes.{key}") for key in counts)
    )  # fmt: skip
    caption = (
        f"Probes: {show(fields.get('num_questions'))} questions with known answers in "
        f"{show(fields.get('num_contexts'))} contexts"
    )
    table = Table(caption, ("Stratum", "Questions", "Baseline right", "Lost", "Gained"), (whole, *rows))
    left_out = [as_mapping(item) for item in as_sequence(fields.get("left_out"))]
    if not left_out:
        return (table,)
    named = ", ".join(
        f"{show(t.get('task'))} ({show(t.get('solved'))} of {show(t.get('num_questions'))})" for t in left_out
    )
    return (table, Paragraph(f"Left out, since the baseline hardly solves them: {named}.", "muted"))


def _answers(answers: Place) -> tuple[Block, ...]:
    rows = tuple(
        (
            placed(p.at("request_id")),
            placed(p.at("status"), tone=_TONES.get(show(p.at("status").value), "")),
            _text(p.at("baseline_answer")), _text(p.at("candidate_answer")),
        )
        for p in answers.at("requests").elements()[:MAX_ANSWERS]
    )  # fmt: skip
    if not rows:
        return ()
    fields = as_mapping(answers.value)
    by = show(fields.get("checker")) if fields.get("checker") else "equality"
    caption = f"Whole answers of {show(fields.get('num_requests'))} requests, judged by {by}"
    return (Table(caption, ("Request", "Status", "Baseline", "Candidate"), rows),)


_TONES: dict[str, Tone] = {"harmed": "bad", "in doubt": "warn"}


def _text(answer: Place) -> Cell:
    text = show(answer.value)
    return Cell(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}...", pointer=answer.pointer)
