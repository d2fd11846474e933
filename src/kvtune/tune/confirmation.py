"""The winner against the baseline on requests the search never saw; loads interleaved, A/A beside them.

Search results carry the winner's curse: the best of many noisy trials looks better than it is. Only
what is measured here is reported as a gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvtune.errors import InvariantError
from kvtune.quality import (
    Gate,
    QualityVerdict,
    Reference,
    SharedError,
    Slo,
    SpeedRatios,
    Verdict,
    ask_baseline,
    compare_speed,
    judge_candidate,
    record_reference,
)
from kvtune.target import Config, LoadReport, LoadRequest, RunningTarget, Target
from kvtune.tune.evaluation import CRASHES, Baseline, plain, started, warmed
from kvtune.tune.loads import LoadPlan, choose_for_quality
from kvtune.tune.pace import Pace
from kvtune.tune.settings import TuneSettings
from kvtune.tune.space import SearchSpace
from kvtune.workload import TokenRequest

__all__ = ["Confirmation", "Confirmed", "candidate_s", "reserve_s"]

MAX_ROUNDS = 8
"""Pairs of load runs at most; more are run only while the interval straddles the limit and time is left."""
SAFETY = 1.25
DECODE_SHARE = 0.4
"""Most of the time left that the decode replays of baseline and candidate may take."""
PROBE_SHARE = 0.25
"""Of the time left, what the probes of baseline and two candidates may take, where probes are asked."""


def reserve_s(pace: Pace, baseline: Baseline, *, has_probes: bool = False) -> float:
    """Seconds the confirmation of one candidate needs, from what its parts cost in the search; with probes,
    which cost nothing yet, so much more that their share can be taken from it."""
    count = baseline.num_quality
    reference = (
        pace.cost_s("start"), pace.cost_s("reference", count), pace.cost_s("decode", baseline.decode_tokens),
        pace.cost_s("long load"),
    )  # fmt: skip
    needed = SAFETY * sum(reference) + candidate_s(pace, baseline)
    return needed / (1 - PROBE_SHARE) if has_probes else needed


def candidate_s(pace: Pace, baseline: Baseline) -> float:
    """Seconds for one candidate at the search's number of requests: replays, recorded answers, a load run
    and one more of the baseline. Further rounds use what is left."""
    count = baseline.num_quality
    replayed = pace.cost_s("replay", count) or pace.cost_s("reference", count) / 2
    parts = (
        2 * pace.cost_s("start"), replayed, pace.cost_s("decode", baseline.decode_tokens),
        pace.cost_s("probes"),
        pace.cost_s("reference", count) / 3,  # a third of the reference run is generation
        2 * pace.cost_s("long load"),
    )  # fmt: skip
    return SAFETY * sum(parts)


def affordable_requests(pace: Pace, baseline: Baseline, *, share: float = 1.0) -> int:
    """Requests this share of the time left can replay for the baseline and two candidates; at least the
    search's count."""
    fixed = 4 * pace.cost_s("start") + 5 * pace.cost_s("long load")
    fixed += 2 * pace.cost_s("decode", baseline.decode_tokens)  # a candidate that fails by prefill takes none
    each = pace.cost_s("reference") * (1 + 1 / 3) + 2 * (
        pace.cost_s("replay") or pace.cost_s("reference") / 2
    )
    if each <= 0:
        return baseline.num_quality
    return max(baseline.num_quality, int((share * pace.left_s / SAFETY - fixed) / each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """What the CONFIRM half says about one configuration. `rejected`: why not, empty if it stands.

    `answers`: greedy continuations of `requests` under this configuration, for reproduction.
    """

    config: Mapping[str, Any]
    quality: QualityVerdict
    ratios: SpeedRatios
    aa: SpeedRatios
    reports: tuple[LoadReport, ...]
    rejected: str = ""
    speed_verdict: str = "PASS"
    effective: Mapping[str, Any]
    requests: tuple[LoadRequest, ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()


class Confirmation:
    """Baseline measured once on the CONFIRM half; candidates are tried against it in turn."""

    def __init__(
        self, target: Target, space: SearchSpace, settings: TuneSettings, *, pace: Pace,
        search: Baseline, requests: Sequence[TokenRequest], rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._target, self._space, self._settings = target, space, settings
        self._pace, self._search, self._rng = pace, search, rng
        self._slo = settings.slo or Slo()
        has_questions = settings.questions.probes is not None
        share = 1 - PROBE_SHARE if has_questions else 1.0
        count = min(affordable_requests(pace, search, share=share), settings.max_confirm_requests)
        self._chosen = choose_for_quality(requests, count, rng)
        plan = LoadPlan.of(
            requests, count=len(search.plan.source), num_short=search.plan.num_short,
            max_tokens=search.plan.max_tokens,
        )  # fmt: skip
        self.plan = replace(plan, arrival_scale=self._saturating_scale(plan))
        self.baseline_reports: list[LoadReport] = []
        self._gate: Gate | None = None
        self._error = SharedError(1)

    def share_error(self, num_candidates: int) -> None:
        """Say how many candidates may be tried: a chance of one false PASS is shared among them."""
        self._error = SharedError(max(1, num_candidates))

    def _saturating_scale(self, plan: LoadPlan) -> float:
        """Saturate as the search did: the same number of requests over the same time."""
        span = plan.source[-1].arrival_s - plan.source[0].arrival_s
        before = self._search.plan
        searched = (before.source[-1].arrival_s - before.source[0].arrival_s) * before.arrival_scale
        return min(1.0, searched / span) if span > 0 else 0.0

    @property
    def gate(self) -> Gate:
        if self._gate is None:
            raise InvariantError("a candidate was confirmed before the baseline")
        return self._gate

    @property
    def reference(self) -> Reference:
        return self.gate.reference

    def measure_baseline(self, *, runs: int = 1) -> None:
        """The gate's side of the baseline (probes and decode replay included) and `runs` load runs."""
        with started(self._target, self._space.baseline, self._settings, self._pace) as running:
            warmed(running, self.plan.long)
            if self._gate is None:
                self._gate = self._recorded(running)
            for _ in range(runs):
                self.baseline_reports.append(self._load(running, self._search.long))

    def _recorded(self, running: RunningTarget) -> Gate:
        settings = self._settings
        replay_settings = replace(settings.replay, decode_budget_tokens=self._decode_tokens())
        begin = self._pace.elapsed_s
        with self._pace.measure("confirm reference", len(self._chosen)):
            reference = record_reference(
                running, self._chosen, replay_settings, is_synthetic_text=settings.is_synthetic_text
            )
        tokens = sum(len(i.prompt_token_ids) + len(i.continuation) for i in reference.items)
        second_per_token = (self._pace.elapsed_s - begin) / tokens  # generation included: never too little
        affordable = PROBE_SHARE * self._pace.left_s / (3 * SAFETY * max(second_per_token, 1e-9))
        questions = settings.questions
        if questions.probe_tokens is None:
            questions = replace(questions, probe_tokens=int(affordable))
        with self._pace.measure("probes"):
            return ask_baseline(
                running, reference, questions, margin=settings.limits, aa_chunk=settings.replay.aa_chunk,
                error=self._error.level(0),
            )  # fmt: skip

    def _decode_tokens(self) -> int:
        """Steps of the decode replay: at least what its shortest requests need, if the time left allows."""
        replay = self._settings.replay
        lengths = sorted(len(r.prompt_token_ids) + min(r.max_tokens, replay.max_tokens) for r in self._chosen)
        needed = sum(lengths[: replay.num_decode])
        if 2 * self._pace.cost_s("decode", needed) > DECODE_SHARE * self._pace.left_s:
            return self._search.decode_tokens
        return max(needed, self._search.decode_tokens)

    def _load(self, running: Any, compared: LoadReport) -> LoadReport:
        deadline = max(5.0, 4 * compared.duration_s)
        with self._pace.measure("long load"):
            report: LoadReport = running.load(self.plan.long, deadline_s=deadline)
        return report

    def aa_ratios(self) -> SpeedRatios:
        """The baseline's later runs against its earlier ones: no smaller difference can be seen."""
        half = (len(self.baseline_reports) + 1) // 2
        first, second = self.baseline_reports[:half], self.baseline_reports[half:]
        if not second:
            return SpeedRatios(ratios={})
        return compare_speed(second, first, slo=self._slo, rng=self._rng)

    def confirm(self, config: Config, *, index: int = 0) -> Confirmed:
        """Candidate `index`, best first: quality, then loads of it and of the baseline in turn until decided.

        A crash of the candidate rejects it with its reason; a crash of the baseline is raised.
        """
        try:
            quality, effective, answers, report = self._first_pass(config, index)
        except CRASHES as error:
            return self._crashed(config, error)
        reports = [] if report is None else [report]
        rejected = "" if quality.verdict is Verdict.PASS else f"{quality.verdict.value}: {quality.reason}"
        if not rejected:
            rejected = self._run_rounds(config, reports)
        ratios = compare_speed(reports, self.baseline_reports, slo=self._slo, rng=self._rng)
        speed_verdict, slow = self._judge_speed(ratios) if not rejected else ("not measured", "")
        return Confirmed(
            config=dict(config), quality=quality, ratios=ratios, aa=self.aa_ratios(), reports=tuple(reports),
            rejected=rejected or slow, speed_verdict=speed_verdict, effective=effective,
            requests=self.asked(), answers=answers,
        )  # fmt: skip

    def baseline_answers(self) -> tuple[tuple[int, ...], ...]:
        """What the baseline generated for `asked`: the recorded continuations."""
        return tuple(tuple(int(t) for t in item.continuation) for item in self.reference.items)

    def asked(self) -> tuple[LoadRequest, ...]:
        """The requests whose answers are recorded, as sent."""
        chosen = {r.request_id: r for r in self._chosen}
        return tuple(
            LoadRequest(
                request_id=item.item_id, prompt_token_ids=item.prompt_token_ids,
                max_tokens=len(item.continuation), cache_salt=chosen[item.item_id].cache_salt,
            )
            for item in self.reference.items
        )  # fmt: skip

    def _first_pass(
        self, config: Config, index: int
    ) -> tuple[QualityVerdict, dict[str, Any], tuple[tuple[int, ...], ...], LoadReport | None]:
        with started(self._target, config, self._settings, self._pace) as running:
            effective: dict[str, Any] = plain(dict(running.effective))
            quality, _ = judge_candidate(
                running, self.gate, is_lossy=self._space.is_lossy(config), rng=self._rng,
                error=self._error.level(index),
            )  # fmt: skip
            if quality.verdict is not Verdict.PASS:
                return quality, effective, (), None
            self._error.passed(index)
            answers = tuple(tuple(int(t) for t in a) for a in running.generate(self.asked()))
            report = self._load(running, self._search.long)
        return quality, effective, answers, report

    def _run_rounds(self, config: Config, reports: list[LoadReport]) -> str:
        """Further pairs of runs until the speed is decided; returns why the candidate failed, if it did."""
        for _ in range(MAX_ROUNDS - 1):
            failed = [r.error for report in reports for r in report.results if r.error is not None]
            if failed:
                return f"{len(failed)} requests of the confirmation load failed: {failed[0]}"
            is_paired = len(self.baseline_reports) >= 2 and len(reports) >= 2
            ratios = compare_speed(reports, self.baseline_reports, slo=self._slo, rng=self._rng)
            if is_paired and self._judge_speed(ratios)[0] != "UNDECIDED":
                return ""
            round_s = 2 * SAFETY * (self._pace.cost_s("start") + self._pace.cost_s("long load"))
            if self._pace.left_s < round_s:
                return ""
            if len(self.baseline_reports) <= len(reports):
                self.measure_baseline()
            try:
                with started(self._target, config, self._settings, self._pace) as running:
                    warmed(running, self.plan.long)
                    reports.append(self._load(running, self._search.long))
            except CRASHES as error:
                return f"crashed in the confirmation: {error}"
        return ""

    def _judge_speed(self, ratios: SpeedRatios) -> tuple[str, str]:
        """(PASS | FAIL | UNDECIDED, why it is rejected).

        PASS: every upper bound within the limit. UNDECIDED stands only with its value within the limit and
        is marked so; beyond it the candidate is rejected.
        """
        limit = self._settings.latency_limit
        if self._settings.slo is not None:
            return "PASS", ""
        if ratios.exceeds(limit, bound="high") is None:
            return "PASS", ""
        name = ratios.exceeds(limit, bound="value")
        if name is None:
            return "UNDECIDED", ""
        ratio = ratios.ratios[name]
        reason = f"{name} is {ratio.value:.3g}x [{ratio.low:.3g}, {ratio.high:.3g}], limit {limit:g}x"
        return ("FAIL" if ratio.low > limit else "UNDECIDED"), reason

    def _crashed(self, config: Config, error: Exception) -> Confirmed:
        reference = self.reference
        reason = " ".join(f"crashed in the confirmation: {error}".split())
        quality = QualityVerdict(
            verdict=Verdict.UNDECIDED, reason=reason, margin=self._settings.limits,
            num_requests=len(reference.items), num_clusters=len(set(reference.clusters)), num_tokens=0,
            is_synthetic_text=self._settings.is_synthetic_text,
        )  # fmt: skip
        return Confirmed(
            config=dict(config), quality=quality, ratios=SpeedRatios(ratios={}), aa=self.aa_ratios(),
            reports=(), rejected=reason, speed_verdict="not measured", effective={},
        )  # fmt: skip
