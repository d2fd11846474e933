"""The funnel: closed form, then quality, then a short load, then the long one; each stage may stop a trial.

A crash, a timeout or a refusal ends one trial, never the study: it is infeasible and says why.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from kvtune.errors import HostError, InvariantError, TargetError, UnsupportedModelError, UsageError
from kvtune.quality import (
    Reference,
    Slo,
    SpeedRatios,
    Verdict,
    compare_speed,
    judge,
    record_reference,
    replay,
    summarise,
)
from kvtune.target import Config, LoadReport, LoadRequest, RunningTarget, Target
from kvtune.tune.loads import LoadPlan, choose_for_quality
from kvtune.tune.pace import Pace
from kvtune.tune.settings import TuneSettings
from kvtune.tune.space import ReadKey, SearchSpace
from kvtune.tune.trial import Objective, Status, Trial
from kvtune.workload import TokenRequest

__all__ = ["CRASHES", "Baseline", "Evaluator", "plain", "started", "warmed"]

REPORTED = ("kernel", "read_contract", "dtype", "kv_capacity_tokens", "num_blocks", "kv_bytes_per_token",
            "layer_codecs")  # fmt: skip
RUNAWAY_FACTOR = 4.0
"""A load run that takes this many times the baseline's is not going to be within 1.1x: it is cut off."""
MIN_LOAD_DEADLINE_S = 5.0
CONFIRM_SHRINKS = 0.6
"""An interval of the confirmation against one of the search: it replays up to 256 requests, not 96."""
TRIES = 2
"""A neighbour's burst of work can double one load run; two in a row are the configuration's own."""
CRASHES = (UsageError, HostError, TargetError, UnsupportedModelError, OSError, RuntimeError, MemoryError)
"""What ends one configuration and not the run. InvariantError is not among them: it is a bug of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The baseline measured on the SEARCH half: what every trial is compared with."""

    bytes_per_token: float
    effective: Mapping[str, Any]
    reference: Reference
    short: LoadReport
    long: LoadReport
    aa_long: LoadReport
    plan: LoadPlan
    num_quality: int
    decode_tokens: int


@contextmanager
def started(target: Target, config: Config, settings: TuneSettings, pace: Pace) -> Generator[RunningTarget]:
    """A running engine whose start was timed; always closed."""
    with pace.measure("start"):
        running = target.start(config, kv_budget_bytes=settings.kv_budget_bytes)
    with running:
        yield running


def warmed(running: RunningTarget, requests: Sequence[LoadRequest]) -> None:
    """Let first-use costs (buffers, compilation) fall outside of what is measured."""
    first = min(requests, key=lambda r: len(r.prompt_token_ids))
    running.generate(
        [LoadRequest(request_id="warmup", prompt_token_ids=first.prompt_token_ids, max_tokens=2)]
    )


def plain(value: Any) -> Any:
    """Numpy scalars and foreign containers to what JSON holds; anything else as text."""
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in cast("Collection[Any]", value)]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def may_pass(quality: Mapping[str, Any]) -> bool:
    """PASS, or UNDECIDED with every metric inside its margin: the larger confirmation set may settle it."""
    if quality["verdict"] != Verdict.UNDECIDED.value:
        return bool(quality["verdict"] == Verdict.PASS.value)
    metrics = quality.get("metrics", {}).values()
    return bool(metrics) and all(
        m["more_requests"] is not None and m["excess"]["value"] <= m["margin"]
        for m in metrics
        if m["verdict"] != Verdict.PASS.value
    )


def is_likely(quality: Mapping[str, Any]) -> bool:
    """PASS, or UNDECIDED by bounds so little too wide that the larger confirmation set should settle it.

    Where neighbouring candidates differ by a few per cent of bytes, `may_pass` would let through one that is
    as likely to fail as not, and each that fails costs those after it their share of the error.
    """
    if quality["verdict"] == Verdict.PASS.value:
        return True
    if not may_pass(quality):
        return False
    excesses = [(m["excess"], m["margin"]) for m in quality["metrics"].values()]
    return all(
        e["high"] is not None and e["value"] + CONFIRM_SHRINKS * (e["high"] - e["value"]) <= limit
        for e, limit in excesses
    )


class Evaluator:
    """Measures configurations on the SEARCH half. Owns the verdicts known per combination of lossy knobs."""

    def __init__(
        self, target: Target, space: SearchSpace, settings: TuneSettings, *, pace: Pace,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._target, self._space, self._settings = target, space, settings
        self._pace, self._rng = pace, rng
        self._slo = settings.slo or Slo()
        self.objective = Objective(settings.slo is not None)
        self.margin = settings.limits
        self.verdicts: dict[ReadKey, Mapping[str, Any]] = {}
        self._baseline: Baseline | None = None
        self._aa: SpeedRatios | None = None

    @property
    def baseline(self) -> Baseline:
        if self._baseline is None:
            raise InvariantError("a configuration was evaluated before the baseline")
        return self._baseline

    def recall(self, trials: Sequence[Trial]) -> None:
        """Take over verdicts of an earlier, interrupted run of the same study."""
        for trial in trials:
            if trial.quality is not None:
                self.verdicts.setdefault(self._space.read_key(trial.config), trial.quality)

    # -- baseline

    def measure_baseline(self, search: Sequence[TokenRequest]) -> Baseline:
        """Start the baseline, size the run by what it costs here, record reference and loads.

        Raises what the target raises: without a baseline there is nothing to tune.
        """
        settings, pace = self._settings, self._pace
        config = self._space.baseline
        plan = LoadPlan.of(
            search, count=settings.max_load_requests, num_short=settings.num_short_load,
            max_tokens=settings.load_max_tokens,
        )  # fmt: skip
        with started(self._target, config, settings, pace) as running:
            warmed(running, plan.long)
            count, decode_tokens = self._probe(running, search)
            with pace.measure("reference", count):
                reference = record_reference(
                    running, choose_for_quality(search, count, self._rng), settings.replay, num_decode=0,
                    is_synthetic_text=settings.is_synthetic_text,
                )  # fmt: skip
            plan = self._fit_load(running, plan)
            with pace.measure("long load"):
                long = running.load(plan.long, deadline_s=max(pace.left_s, MIN_LOAD_DEADLINE_S))
            if all(r.error is not None for r in long.results):
                raise TargetError(f"the baseline served no request of the load: {long.results[0].error}")
            aa_long = running.load(plan.long, deadline_s=max(pace.left_s, MIN_LOAD_DEADLINE_S))
            short = running.load(plan.short, deadline_s=max(pace.left_s, MIN_LOAD_DEADLINE_S))
            effective = plain(dict(running.effective))
        self._baseline = Baseline(
            bytes_per_token=self._target.kv_bytes_per_token(config, context=settings.context),
            effective=effective, reference=reference, short=short, long=long, aa_long=aa_long, plan=plan,
            num_quality=count, decode_tokens=decode_tokens,
        )  # fmt: skip
        self._aa = compare_speed([aa_long], [long], slo=self._slo, rng=self._rng)
        latencies = [r.value for name, r in self._aa.ratios.items() if name != "goodput"]
        noise = max([1.0, *latencies, *(1 / value for value in latencies if value > 0)])
        self.objective = Objective(settings.slo is not None, noise=noise)
        self.verdicts[self._space.read_key(config)] = {
            "verdict": Verdict.PASS.value, "reason": "reads as the baseline does", "lossless": True,
            "proven": True, "bit_equal": True,
        }  # fmt: skip
        return self._baseline

    def _probe(self, running: RunningTarget, search: Sequence[TokenRequest]) -> tuple[int, int]:
        """Cost of a replayed request and of a decode-replay step, from two requests of middle length.

        Returns how many requests to replay per half and how many decode steps to allow.
        """
        order = sorted(search, key=lambda r: len(r.prompt_token_ids))
        middle = order[len(order) // 2 : len(order) // 2 + 2]
        with self._pace.measure("reference", len(middle)):
            probe = record_reference(running, middle, self._settings.replay, num_decode=0)
        if self._settings.replay.num_decode:
            item = min(probe.items, key=lambda i: len(i.prompt_token_ids))
            length = len(item.prompt_token_ids) + len(item.continuation)
            with self._pace.measure("decode", length):
                running.score([item], num_top=probe.num_top, chunk=1)
        count = self._pace.affordable(
            "reference", share=0.05, low=12, high=min(self._settings.max_quality_requests, len(search))
        )
        return count, self._pace.affordable(
            "decode", share=0.06, low=0, high=self._settings.replay.decode_budget_tokens
        )

    def _fit_load(self, running: RunningTarget, plan: LoadPlan) -> LoadPlan:
        """Send the short load at once to learn a request's cost; size and time the long one by it."""
        with self._pace.measure("load request", plan.num_short):
            running.load(plan.short, deadline_s=max(self._pace.left_s, MIN_LOAD_DEADLINE_S))
        count = self._pace.affordable(
            "load request", share=0.03, low=min(plan.num_short, len(plan.source)), high=len(plan.source)
        )
        plan = LoadPlan.of(plan.source, count=count, num_short=plan.num_short, max_tokens=plan.max_tokens)
        if self._settings.slo is not None:
            return plan  # how many are held at once is the question: all arrive together
        burst = running.load(plan.long, deadline_s=max(self._pace.left_s, MIN_LOAD_DEADLINE_S))
        return plan.saturating(burst)

    # -- one trial

    def bytes_per_token(self, config: Config) -> float | None:
        """Predicted allocator bytes per token at the reference context; None where it cannot be sized."""
        try:
            return self._target.kv_bytes_per_token(config, context=self._settings.context)
        except UsageError:
            return None

    def baseline_trial(self, number: int) -> Trial:
        """Trial 0: the baseline against itself."""
        base = self.baseline
        return Trial(
            number=number, config=self._space.baseline, status=Status.COMPLETE, reason="baseline",
            metrics=plain(self._metrics(self._space.baseline, base.bytes_per_token, [base.long])),
            ratios=self._aa.to_dict() if self._aa else {},
            effective=_reported(base.effective),
        )  # fmt: skip

    def evaluate(self, number: int, config: Config, best: Trial | None) -> Trial:
        """Run one configuration through the funnel."""
        found = _Findings(number=number, config=dict(config))
        begin = self._pace.elapsed_s
        try:
            status, reason = self._judge_unstarted(config, best, found)
            if status is None:
                with self._pace.measure("trial"):
                    status, reason = self._measure(config, found)
        except UsageError as error:
            status, reason = Status.INFEASIBLE, str(error)
        except CRASHES as error:  # one trial, never the study
            status, reason = Status.FAILED, f"{type(error).__name__}: {error}"
        return found.trial(status, reason, self._pace.elapsed_s - begin)

    def _judge_unstarted(
        self, config: Config, best: Trial | None, found: _Findings
    ) -> tuple[Status | None, str]:
        size = self._target.kv_bytes_per_token(config, context=self._settings.context)
        found.metrics = self._metrics(config, size)
        known = self.verdicts.get(self._space.read_key(config))
        if known is not None and not may_pass(known):
            found.quality = known
            return Status.INFEASIBLE, f"{known['verdict']}: {known['reason']}"
        if not self.objective.can_beat(size, best):
            return Status.PRUNED, f"{size:.4g} bytes per token cannot beat the best so far"
        return None, ""

    def _measure(self, config: Config, found: _Findings) -> tuple[Status, str]:
        base = self.baseline
        with started(self._target, config, self._settings, self._pace) as running:
            found.effective = _reported(running.effective)
            found.notes = _cancelled(config, running.effective)
            found.quality = self.quality_of(config, running)
            if not may_pass(found.quality):
                return Status.INFEASIBLE, f"{found.quality['verdict']}: {found.quality['reason']}"
            warmed(running, base.plan.long)
            for requests, compared in ((base.plan.short, base.short), (base.plan.long, base.long)):
                reason = ""
                for _ in range(TRIES):
                    reason = self._measure_load(config, running, requests, compared, found)
                    if not reason:
                        break
                else:
                    return Status.INFEASIBLE, reason
        return Status.COMPLETE, ""

    def _measure_load(
        self, config: Config, running: RunningTarget, requests: Sequence[LoadRequest], compared: LoadReport,
        found: _Findings,
    ) -> str:  # fmt: skip
        """Run one load into `found`; says why it rules the configuration out, or nothing."""
        report = running.load(requests, deadline_s=self._load_deadline(compared))
        found.metrics = self._metrics(config, found.metrics["kv_bytes_per_token"], [report])
        failed = [r.error for r in report.results if r.error is not None]
        if failed:
            return f"{len(failed)} of {len(requests)} requests failed: {failed[0]}"
        ratios = compare_speed([report], [compared], slo=self._slo, rng=self._rng)
        found.ratios = ratios.to_dict()
        return self._too_slow(ratios)

    def probe_quality(self, config: Config) -> Mapping[str, Any] | None:
        """Start the configuration only for its verdict; None if it does not run."""
        try:
            with started(self._target, config, self._settings, self._pace) as running:
                return self.quality_of(config, running)
        except CRASHES:
            return None

    def quality_of(self, config: Config, running: RunningTarget) -> Mapping[str, Any]:
        """The verdict on the SEARCH half, replayed once per combination of lossy knobs."""
        key = self._space.read_key(config)
        if key not in self.verdicts:
            reference = self.baseline.reference
            with self._pace.measure("replay", len(reference.items)):
                scores = replay(running, reference)
            verdict = judge(reference, scores, margin=self.margin, rng=self._rng,
                            is_lossy=self._space.is_lossy(config))  # fmt: skip
            self.verdicts[key] = verdict.to_dict()
        return self.verdicts[key]

    def _load_deadline(self, compared: LoadReport) -> float:
        return max(MIN_LOAD_DEADLINE_S, min(self._pace.left_s, RUNAWAY_FACTOR * compared.duration_s))

    def _too_slow(self, ratios: SpeedRatios) -> str:
        """The search rejects what is surely slower: a lower bound beyond the limit and the A/A noise.

        What is surely not slower only the confirmation says, by the upper bound.
        """
        limit = self._settings.latency_limit * self.objective.noise
        name = None if self.objective.has_slo else ratios.exceeds(limit, bound="low")
        if name is None:
            return ""
        ratio = ratios.ratios[name]
        return (
            f"{name} is {ratio.value:.3g}x the baseline's (at least {ratio.low:.3g}x), "
            f"limit {self._settings.latency_limit:g}x"
        )

    def _metrics(
        self, config: Config, bytes_per_token: float, reports: Sequence[LoadReport] = ()
    ) -> dict[str, Any]:
        sizes = {"kv_bytes_per_token": bytes_per_token, "num_changed": self._space.num_changed(config)}
        return {**sizes, **summarise(reports, self._slo)} if reports else sizes


@dataclass(slots=True)
class _Findings:
    """What a trial has learnt so far, kept also when it ends early."""

    number: int
    config: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    ratios: dict[str, Any] = field(default_factory=dict[str, Any])
    quality: Mapping[str, Any] | None = None
    effective: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    def trial(self, status: Status, reason: str, elapsed_s: float) -> Trial:
        return Trial(
            number=self.number, config=self.config, status=status, reason=" ".join(reason.split()),
            metrics=plain(self.metrics), ratios=plain(self.ratios), quality=plain(self.quality),
            effective=plain(self.effective), elapsed_s=round(elapsed_s, 3), notes=self.notes,
        )  # fmt: skip


def _reported(effective: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(effective[name]) for name in REPORTED if name in effective}


def _cancelled(config: Config, effective: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings that the engine did not take as asked: a finding, since its figures are another's."""
    asked = dict(config)
    table = asked.pop("layer_codecs", None)
    if table:  # then codecs are told by layer, and no one name is right for all
        common = [asked.pop("k_codec", None), asked.pop("v_codec", None)]
        asked["layer_codecs"] = {
            layer: list(table.get(layer, common)) for layer in effective.get("layer_codecs", table)
        }
    return tuple(
        f"asked {name}={asked[name]!r}, the engine runs {effective[name]!r}"
        for name in asked
        if name in effective and plain(effective[name]) != plain(asked[name])
    )
