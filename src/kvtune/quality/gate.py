"""The whole gate for one baseline and its candidates: what is recorded once and what each candidate costs.

    baseline:  reference (generate, score, A/A) -> probes -> high-value and judged answers
    candidate: replay in looks -> decode replay -> probes -> answers; the first clear NO ends it

A candidate that is plainly harmful is found out on the first look; what is cheap comes before what is not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvtune.errors import InvariantError
from kvtune.quality.answers import (
    AnswerOutcome,
    AnswerReference,
    Judged,
    judge_answers,
    record_answers,
)
from kvtune.quality.bootstrap import CONFIDENCE
from kvtune.quality.levels import Look, is_decided, looks_of
from kvtune.quality.margins import Margin
from kvtune.quality.probes import (
    SHORTEST,
    ProbeOutcome,
    ProbeReference,
    ProbeSource,
    ask_probes,
    judge_probes,
    num_probes_for,
    record_probes,
)
from kvtune.quality.replay import Reference, replay, replay_decode
from kvtune.quality.verdict import QualityVerdict, Verdict, judge
from kvtune.target import RunningTarget, Scores

__all__ = ["Gate", "GateCost", "GateQuestions", "ask_baseline", "judge_candidate"]

MIN_PROBES = 24
"""Contexts asked however short the time is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateQuestions:
    """What is asked beyond the replay. `num_probes`: contexts, None for as many as the margin needs;
    `probe_tokens`: most tokens of all probes together. `answers`: high-value requests and judged samples."""

    probes: ProbeSource | None = None
    num_probes: int | None = None
    probe_tokens: int | None = None
    answers: tuple[Judged, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The baseline's side, recorded once."""

    reference: Reference
    margin: Margin
    probes: ProbeReference | None = None
    answers: tuple[AnswerReference, ...] = ()
    aa_chunk: int = 96

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample: one forward pass."""
        items = sum(len(i.prompt_token_ids) + len(i.continuation) for i in self.reference.items)
        return items + (0 if self.probes is None else self.probes.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateCost:
    """Tokens that went through the model for a candidate. `sample`: those of the whole sample."""

    replayed: int
    decoded: int
    probed: int
    sample: int

    @property
    def passes(self) -> float:
        """Forward passes over the sample; answers that the user asked to generate are not part of it."""
        return (self.replayed + self.decoded + self.probed) / max(1, self.sample)


def ask_baseline(
    running: RunningTarget, reference: Reference, questions: GateQuestions, *, margin: Margin,
    aa_chunk: int, error: float = 1 - CONFIDENCE,
) -> Gate:  # fmt: skip
    """Put probes and requests for whole answers to the started baseline. `error`: the smallest share a
    candidate will be tested at; probes are drawn so that it can be met."""
    probes = None
    if questions.probes is not None:
        count = questions.num_probes or num_probes_for(margin.probes, 1 - error)
        if questions.probe_tokens is not None:  # fewer than the margin needs leave it undecided, and say so
            count = min(count, max(MIN_PROBES, questions.probe_tokens // SHORTEST))
        rng = random.Random(questions.seed)  # noqa: S311 (a reproducible draw, not a secret)
        mean = float("inf") if questions.probe_tokens is None else questions.probe_tokens / count
        probes = record_probes(
            running, questions.probes, rng, count=count, chunk=reference.chunk,
            mean_tokens=mean,
        )  # fmt: skip
    answers = tuple(record_answers(running, judged, aa_chunk=aa_chunk) for judged in questions.answers)
    return Gate(reference=reference, margin=margin, probes=probes, answers=answers, aa_chunk=aa_chunk)


def judge_candidate(
    running: RunningTarget, gate: Gate, *, is_lossy: bool, rng: np.random.Generator,
    error: float = 1 - CONFIDENCE,
) -> tuple[QualityVerdict, GateCost]:  # fmt: skip
    """The started candidate's verdict, wrong in either direction with a chance of at most `error`."""
    return _Candidate(running, gate, is_lossy=is_lossy, rng=rng, error=error).judge()


class _Candidate:
    """One candidate on its way through the gate."""

    def __init__(
        self, running: RunningTarget, gate: Gate, *, is_lossy: bool, rng: np.random.Generator, error: float
    ) -> None:
        self._running, self._gate, self._rng = running, gate, rng
        self._is_lossy, self._error = is_lossy, error
        self._scores: list[Scores] = []
        self._decoded_scores: tuple[Scores, ...] | None = None
        self._decoded = self._probed = 0

    def judge(self) -> tuple[QualityVerdict, GateCost]:
        verdict, look = self._replay_in_looks()
        if verdict.is_lossless and self._gate.reference.decode_items:
            verdict = self._weigh(look, decoded=self._decode())  # bits that prefill shares decode may not
        if verdict.verdict is Verdict.PASS and not verdict.is_lossless:
            verdict = self._ask_further(look)
        head = self._gate.reference.items[: len(self._scores)]
        cost = GateCost(
            replayed=sum(len(i.prompt_token_ids) + len(i.continuation) for i in head),
            decoded=self._decoded, probed=self._probed, sample=self._gate.num_tokens,
        )  # fmt: skip
        return verdict, cost

    def _replay_in_looks(self) -> tuple[QualityVerdict, Look]:
        """Replay until a look decides. Harm ends it at once; harmlessness only on enough sessions."""
        reference = self._gate.reference
        looks = looks_of(len(reference.items), error=self._error)
        for look in looks:
            part = replace(
                reference.head(look.num_items), items=reference.items[len(self._scores) : look.num_items]
            )
            self._scores += replay(self._running, part)
            verdict = self._weigh(look)
            is_pass = verdict.verdict is Verdict.PASS and not verdict.is_bit_equal
            is_fail = verdict.verdict is Verdict.FAIL
            if is_decided(look, is_pass=is_pass, is_fail=is_fail, num_clusters=verdict.num_clusters):
                return verdict, look
        raise InvariantError("no look was the last")

    def _ask_further(self, look: Look) -> QualityVerdict:
        """Decode replay, probes and whole answers, in the order of their price; the first NO ends it."""
        decoded = self._decode() if self._gate.reference.decode_items else ()
        if decoded:
            verdict = self._weigh(look, decoded=decoded)
            if verdict.verdict is not Verdict.PASS:
                return verdict
        probes = self._ask_probes()
        answers: AnswerOutcome | None = None
        for reference in self._gate.answers:
            found = judge_answers(self._running, reference, rng=self._rng, confidence=1 - self._error)
            answers = found if answers is None else answers.joined(found)
        return self._weigh(look, decoded=decoded, probes=probes, answers=answers)

    def _decode(self) -> tuple[Scores, ...]:
        if self._decoded_scores is not None:
            return self._decoded_scores
        reference = self._gate.reference
        items = [reference.items[i] for i in reference.decode_items]
        self._decoded = sum(len(i.prompt_token_ids) + len(i.continuation) for i in items)
        self._decoded_scores = replay_decode(
            self._running, reference.items, reference.decode_items, num_top=reference.num_top
        )
        return self._decoded_scores

    def _ask_probes(self) -> ProbeOutcome | None:
        probes = self._gate.probes
        if probes is None or not probes.probes:
            return None
        self._probed = probes.num_tokens
        return judge_probes(probes, ask_probes(self._running, probes), confidence=1 - self._error)

    def _weigh(
        self, look: Look, *, decoded: Sequence[Scores] = (), probes: ProbeOutcome | None = None,
        answers: AnswerOutcome | None = None,
    ) -> QualityVerdict:  # fmt: skip
        return judge(
            self._gate.reference.head(look.num_items), self._scores[: look.num_items],
            margin=self._gate.margin, is_lossy=self._is_lossy, rng=self._rng, decode_scores=decoded or None,
            probes=probes, answers=answers, confidence=look.confidence,
            num_planned=len(self._gate.reference.items),
        )  # fmt: skip
