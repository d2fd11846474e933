"""A tuning run from start to recipe: baseline, search within the budget, confirmation, files.

    locked folder -> study -> baseline (sizes the run) -> trials -> frontier -> confirmation -> files
                                                 ^ Ctrl-C anywhere leaves the journal: --resume

The search stops when only the time that the confirmation needs is left.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.config import format_layer_codecs
from kvtune.quality import Verdict
from kvtune.recipe import canonical_json, write_atomically
from kvtune.target import AllocatesLayers, Config, LoadRequest, Target
from kvtune.tune.ablation import Ablation
from kvtune.tune.confirmation import Confirmation, Confirmed, candidate_s, reserve_s
from kvtune.tune.evaluation import Evaluator, may_pass, plain
from kvtune.tune.evidence import evidence_record
from kvtune.tune.known import Known, bisecting
from kvtune.tune.layer_search import LayerSearch, LayerSearchResult, kl_of, layer_record
from kvtune.tune.outcome import Outcome, is_better_confirmed
from kvtune.tune.pace import Pace
from kvtune.tune.settings import Progress, ProgressEvent, TuneResult, TuneSettings
from kvtune.tune.space import SearchSpace
from kvtune.tune.squeeze import SQUEEZE_SHARE, SqueezeProof, prove_planes
from kvtune.tune.study import JOURNAL, Study, locked_folder
from kvtune.tune.trial import Status, Trial
from kvtune.workload import TokenRequest, split_by_session

__all__ = ["run"]

OUTPUTS = ("result.json", "recipe.json", "trials.jsonl", "confirmation.jsonl", "report.html", "report.md")
LADDER_SHARE = 0.5
"""Once each combination of lossy knobs is judged, what is left are ties: a sharper verdict is worth more."""
LAYER_SHARE = 0.2
"""Of the budget, what is kept for codecs layer by layer once the uniform configurations were searched."""
PROPOSALS = 6
"""Proposals of the sampler that may be known or hopeless before a random open point is taken."""


def run(
    target: Target, requests: Sequence[TokenRequest], settings: TuneSettings, out_dir: str | Path, *,
    progress: Progress | None = None, clock: Callable[[], float] = time.monotonic,
    rng: np.random.Generator | None = None,
) -> TuneResult:  # fmt: skip
    """Find, confirm and write the recipe. Files: recipe.json, result.json, trials.jsonl, confirmation.jsonl.

    Raises UsageError (bad input, unwritable folder, nothing to resume), what the target raises when the
    baseline itself does not run, and KeyboardInterrupt after leaving a study that `resume` continues.
    """
    folder = Path(out_dir)
    created = not folder.exists()
    generator = rng if rng is not None else np.random.default_rng(settings.seed)
    try:
        with locked_folder(folder):
            return _Run(
                target, requests, settings, folder, progress=progress, clock=clock, rng=generator
            ).execute()
    finally:
        if created and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _Run:
    """State of one run; lives as long as `run`."""

    def __init__(
        self, target: Target, requests: Sequence[TokenRequest], settings: TuneSettings, folder: Path,
        *, progress: Progress | None, clock: Callable[[], float], rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._target, self._settings, self._folder, self._rng = target, settings, folder, rng
        self._requests = tuple(requests)
        self._progress = progress
        self._pace = Pace(clock, settings.budget_s)
        # the split must be the same after --resume, whatever else was drawn
        self._search_half, self._confirm_half = split_by_session(
            self._requests, 0.5, np.random.default_rng(settings.seed)
        )
        self._space = SearchSpace(target.knobs())
        self._evaluator = Evaluator(target, self._space, settings, pace=self._pace, rng=rng)
        self._known = Known(target, self._space, self._evaluator, context=settings.context)

    # -- the journey

    def execute(self) -> TuneResult:
        identity = plain(dict(self._target.identity()))
        study = Study.open(
            self._folder, self._space, fingerprint=self._fingerprint(identity),
            resume=self._settings.resume, seed=self._settings.seed,
        )  # fmt: skip
        if not self._settings.resume:
            for name in OUTPUTS:
                (self._folder / name).unlink(missing_ok=True)
        for trial in study.trials():
            self._known.remember(trial)
        self._evaluator.recall(self._known.trials)
        try:
            self._say("baseline", "measuring the baseline")
            self._evaluator.measure_baseline(self._search_half)
        except KeyboardInterrupt:
            raise
        except BaseException:
            if not self._known.trials:  # nothing to resume: leave nothing behind
                (self._folder / JOURNAL).unlink(missing_ok=True)
            raise
        stop_reason = self._search(study)
        layers = self._search_layers(study)
        self._probe_frontier()
        candidates = self._known.candidates()
        ablation = Ablation(self._evaluator, self._space, self._known.trials, pace=self._pace)
        with self._pace.holding(ablation.cost_s(candidates[0].config) if candidates else 0.0):
            with self._pace.holding(self._squeeze_s()):
                confirmation = self._confirmation(candidates)
                confirmed, rejected = self._confirm(confirmation, candidates)
            squeeze = self._prove_squeeze(confirmation, confirmed)
        further: dict[str, Any] = {}
        if confirmed is not None:
            self._say("evidence", "the winner one setting at a time, its memory, its answers")
            further = evidence_record(
                confirmation, confirmed, ablation, target=self._target, settings=self._settings,
                requests=self._confirm_half, baseline=self._space.baseline, pace=self._pace, rng=self._rng,
            )  # fmt: skip
        outcome = Outcome(
            target=self._target, settings=self._settings, identity=identity, requests=self._requests,
            search=self._evaluator.baseline, baseline_config=self._space.baseline,
            baseline_reports=confirmation.baseline_reports, aa=confirmation.aa_ratios(),
            confirmed=confirmed, rejected=rejected, trials=self._known.trials, squeeze=squeeze,
            failing_step=self._known.failing_step(confirmed, rejected), stop_reason=stop_reason,
            elapsed_s=round(self._pace.elapsed_s, 2), recipe_path=str(self._folder / "recipe.json"),
            split={"num_requests": len(self._requests), "num_search": len(self._search_half),
                   "num_confirm": len(self._confirm_half)},
            further={**further, "layers": layer_record(
                self._target, layers, self._space.baseline if confirmed is None else confirmed.config,
                context=self._settings.context)},
        )  # fmt: skip
        answers = confirmation.baseline_answers() if confirmed is None else confirmed.answers
        return self._write(outcome, zip(confirmation.asked(), answers, strict=True))

    def _fingerprint(self, identity: Mapping[str, Any]) -> str:
        """What a resumed study must share with the one it continues."""
        settings = self._settings
        asked = {
            "model": identity.get("model"), "engine": self._target.name,
            "knobs": [[k.name, list(k.values), k.baseline] for k in self._space.knobs],
            "requests": [[r.request_id, len(r.prompt_token_ids), r.max_tokens] for r in self._requests],
            "margin": settings.margin, "seed": settings.seed, "kv_budget": settings.kv_budget_bytes,
            "slo": None if settings.slo is None else [settings.slo.ttft_p95_s, settings.slo.tpot_p95_s],
            "context": settings.context, "engine_settings": settings.engine, "per_layer": settings.per_layer,
            "squeeze": settings.squeeze,
        }  # fmt: skip
        return hashlib.sha256(canonical_json(plain(asked)).encode()).hexdigest()

    # -- search

    def _search(self, study: Study) -> str:
        """Trials until the budget, the space or the patience ends; returns which."""
        if not self._known.trials:
            study.enqueue(self._space.baseline)
            for config in bisecting([c for _, c in self._known.ladder if self._space.is_lossy(c)]):
                study.enqueue(config)
        idle = 0
        while True:
            reason = self._stop_reason(idle)
            if reason:
                self._write_trials()
                return reason
            proposal = self._propose(study)
            if proposal is None:
                self._write_trials()
                return "every configuration that could still win was tried"
            number, config = proposal
            before = self._known.best()
            self._say("search", f"trial {number}: {_brief(config)}")
            trial = self._one_trial(number, config, before)
            study.tell(trial, value=self._sampled_value(trial))
            self._known.remember(trial)
            if trial.status is not Status.PRUNED:
                self._write_trials()
                idle = 0 if self._known.best() is not before else idle + 1
            self._say("search", f"trial {number}: {trial.status.value} {trial.reason}".strip(), trial=trial)

    def _one_trial(self, number: int, config: Mapping[str, Any], best: Trial | None) -> Trial:
        if self._known.is_baseline(config):
            return self._evaluator.baseline_trial(number)
        return self._evaluator.evaluate(number, config, best)

    def _stop_reason(self, idle: int) -> str:
        settings = self._settings
        if not self._known.trials:
            return ""
        needed = self._reserve_s() + self._pace.cost_s("trial") + self._layers_s()
        if self._pace.left_s <= needed:
            return "the time left is needed for the confirmation"
        if len(self._known.trials) >= settings.max_trials:
            return f"{settings.max_trials} trials were run"
        is_ladder_done = self._known.is_ladder_done()
        if is_ladder_done and self._pace.elapsed_s > LADDER_SHARE * self._pace.budget_s:
            return "every step of precision was tried; the rest of the budget goes to the confirmation"
        if idle >= settings.patience and is_ladder_done:
            return f"{settings.patience} trials in a row were no better"
        return ""

    def _reserve_s(self) -> float:
        has_probes = self._settings.questions.probes is not None
        needed = reserve_s(self._pace, self._evaluator.baseline, has_probes=has_probes)
        return needed + self._squeeze_s()

    def _propose(self, study: Study) -> tuple[int, dict[str, Any]] | None:
        for _ in range(PROPOSALS + len(self._known.ladder)):
            number, config = study.ask()
            if self._known.is_open(config):
                return number, config
            if self._known.is_new_rung(config):
                return number, config  # one that is ruled out is still a trial worth listing
            study.skip(number)
        left = [c for c in self._space.configs() if self._known.is_open(c)]
        if not left:
            return None
        study.enqueue(left[int(self._rng.integers(len(left)))])
        return study.ask()

    def _sampled_value(self, trial: Trial) -> float | None:
        if trial.status in (Status.PRUNED, Status.FAILED) or trial.bytes_per_token is None:
            return None
        return self._evaluator.objective.value(trial)

    # -- codecs layer by layer

    @property
    def _has_layers(self) -> bool:
        return self._settings.per_layer and isinstance(self._target, AllocatesLayers)

    def _layers_s(self) -> float:
        return LAYER_SHARE * self._pace.budget_s if self._has_layers else 0.0

    def _search_layers(self, study: Study) -> LayerSearchResult | None:
        """Tables below the best uniform configuration; what was judged becomes trials and rungs."""
        uniform = self._known.best_uniform()
        if not self._has_layers or not uniform:
            return None
        search = LayerSearch(
            self._target, self._space, self._settings, evaluator=self._evaluator, pace=self._pace,
            rng=self._rng, left_s=lambda: self._pace.left_s - self._reserve_s() - self._pace.cost_s("trial"),
            say=functools.partial(self._say, "layers"),
        )  # fmt: skip
        anchor = min(uniform, key=lambda t: kl_of(t.quality))
        found = search.run(anchor.config)
        for table in sorted(found.tables, key=lambda t: t.num_bytes):
            self._known.add_rung(table.num_bytes, table.config)
            if self._known.is_seen(table.config):
                continue
            trial = search.trial(study.next_number(), table, self._known.best())
            study.add(trial)
            self._known.remember(trial)
            self._say("layers", f"trial {trial.number}: {trial.status.value} {trial.reason}", trial=trial)
        self._write_trials()
        return found

    # -- the step below the winner

    def _probe_frontier(self) -> None:
        """Replay the next smaller rung if the search did not get to it: users see where harm begins."""
        best = self._known.best()
        if best is None:
            return
        for _, config in self._known.smaller_rungs(best.config):
            known = self._evaluator.verdicts.get(self._space.read_key(config))
            if known is not None and not may_pass(known):
                return
            cost = self._pace.cost_s("start") + self._pace.cost_s(
                "replay", len(self._evaluator.baseline.reference.items)
            )
            if self._pace.left_s < self._reserve_s() + cost:
                return
            if known is None:
                self._say("frontier", f"replaying the next smaller step: {_brief(config)}")
                self._evaluator.probe_quality(config)

    # -- confirmation

    def _confirmation(self, candidates: Sequence[Trial]) -> Confirmation:
        num_candidates = len(candidates)
        self._say("confirm", "measuring the baseline on requests the search never saw")
        confirmation = Confirmation(
            self._target, self._space, self._settings, pace=self._pace, search=self._evaluator.baseline,
            requests=self._confirm_half, rng=self._rng,
        )  # fmt: skip
        num_reached = len(self._known.undecided_below(candidates[0].config)) if candidates else 0
        confirmation.share_error(min(num_candidates + num_reached, self._settings.max_confirmed))
        confirmation.measure_baseline(runs=1 if num_candidates else 2)
        return confirmation

    def _confirm(
        self, confirmation: Confirmation, candidates: Sequence[Trial]
    ) -> tuple[Confirmed | None, list[Confirmed]]:
        """The first candidate that stands and is worth it; the others with their reasons."""
        rejected: list[Confirmed] = []
        harmful: set[str] = set()
        for trial in candidates:
            if self._space.read_key(trial.config) in harmful:
                continue
            if len(rejected) >= self._settings.max_confirmed or (rejected and self._has_no_time()):
                break
            confirmed = self._confirm_one(confirmation, trial.config, len(rejected), rejected)
            if confirmed is not None:
                return self._reach(confirmation, confirmed, rejected), rejected
            if rejected[-1].quality.verdict is not Verdict.PASS:
                harmful.add(self._space.read_key(trial.config))
        if len(confirmation.baseline_reports) < 2:
            confirmation.measure_baseline()
        return None, rejected

    def _confirm_one(
        self, confirmation: Confirmation, config: Config, index: int, rejected: list[Confirmed]
    ) -> Confirmed | None:
        """The candidate if it stands and is worth it; None, and it is in `rejected`, otherwise."""
        self._say("confirm", f"confirming {_brief(config)}")
        found = confirmation.confirm(config, index=index)
        size = self._evaluator.bytes_per_token(config) or 0.0
        ratio = size / self._evaluator.baseline.bytes_per_token
        has_slo = self._settings.slo is not None
        if not found.rejected and is_better_confirmed(found, bytes_ratio=ratio, has_slo=has_slo):
            self._say("confirm", f"confirmed {_brief(config)}: {found.quality.reason}")
            return found
        rejected.append(found)
        why = found.rejected or "no significant gain over the baseline"
        self._say("confirm", f"not confirmed {_brief(config)}: {why}")
        return None

    def _reach(self, confirmation: Confirmation, winner: Confirmed, rejected: list[Confirmed]) -> Confirmed:
        """The smallest of the steps below the winner that stand, tried downwards until the gate stops one.

        The search could not decide them; the requests it never saw are more. The winner's share of the error
        is free once it passed. One that is harmless but slow leaves the others their chance.
        """
        if self._settings.slo is not None:
            return winner  # bytes alone do not win
        index = len(rejected)
        for config in self._known.undecided_below(winner.config):
            index += 1
            if index >= self._settings.max_confirmed or self._has_no_time():
                break
            found = self._confirm_one(confirmation, config, index, rejected)
            if found is None and rejected[-1].quality.verdict is not Verdict.PASS:
                break
            winner = found or winner
        return winner

    def _squeeze_s(self) -> float:
        return SQUEEZE_SHARE * self._pace.budget_s if self._settings.squeeze else 0.0

    def _prove_squeeze(self, confirmation: Confirmation, confirmed: Confirmed | None) -> SqueezeProof | None:
        if not self._settings.squeeze:
            return None
        if confirmed is None:
            return SqueezeProof(planes={}, skipped="no configuration was confirmed")
        self._say("squeeze", "which low planes may go while memory is short")
        return prove_planes(
            self._target, confirmed.config, self._settings, search=self._evaluator.baseline.reference,
            gate=confirmation.gate, pace=self._pace, rng=self._rng,
        )  # fmt: skip

    def _has_no_time(self) -> bool:
        """Whether one more candidate would break the budget."""
        return self._pace.left_s < candidate_s(self._pace, self._evaluator.baseline)

    # -- files

    def _write_trials(self) -> None:
        lines = "".join(json.dumps(t.to_dict(), allow_nan=False) + "\n" for t in self._known.trials)
        write_atomically(self._folder / "trials.jsonl", lines)

    def _write(self, outcome: Outcome, answers: Iterable[tuple[LoadRequest, tuple[int, ...]]]) -> TuneResult:
        """All files; result.json last, as its presence says that the run ended."""
        record = outcome.record()
        recipe = outcome.recipe(record)
        recipe_path = recipe.save(self._folder / "recipe.json")
        record["emitted"] = None if self._settings.emit is None else self._settings.emit(recipe, recipe_path)
        self._write_trials()
        lines = [
            {"request_id": r.request_id, "prompt_token_ids": list(r.prompt_token_ids),
             "token_ids": list(answer), "max_tokens": r.max_tokens, "ignore_eos": r.ignore_eos,
             "cache_salt": r.cache_salt, "temperature": 0.0}
            for r, answer in answers
        ]  # fmt: skip
        write_atomically(
            self._folder / "confirmation.jsonl", "".join(json.dumps(plain(line)) + "\n" for line in lines)
        )
        write_atomically(self._folder / "result.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        return TuneResult(recipe_path=recipe_path, record=record)

    def _say(self, stage: str, message: str, *, trial: Trial | None = None) -> None:
        if self._progress is None:
            return
        best = self._known.best()
        self._progress(
            ProgressEvent(
                stage=stage, message=message, time_left_s=self._pace.until_deadline_s,
                trial=None if trial is None else trial.to_dict(),
                best=None if best is None else best.to_dict(),
            )
        )  # fmt: skip


def _brief(config: Mapping[str, Any]) -> str:
    knobs = [f"{name}={value}" for name, value in config.items() if name != "layer_codecs"]
    return " ".join([*knobs, format_layer_codecs(config.get("layer_codecs", {}))]).rstrip()
