"""What a run knows so far: its trials, the rungs of precision, and which configuration could still win."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from kvtune.quality import Verdict
from kvtune.target import Config, Target
from kvtune.tune.confirmation import Confirmed
from kvtune.tune.evaluation import Evaluator, may_pass
from kvtune.tune.space import SearchSpace
from kvtune.tune.trial import TIE, Status, Trial

__all__ = ["Known", "bisecting"]

T = TypeVar("T")


class Known:
    """Trials as they come and the ladder: every combination of lossy knobs, and tables by layer once they are
    found, as (bytes per token, configuration), largest first. Verdicts are the evaluator's."""

    def __init__(self, target: Target, space: SearchSpace, evaluator: Evaluator, *, context: int) -> None:
        self._space, self._evaluator = space, evaluator
        self.trials: list[Trial] = []
        self._seen: set[str] = set()
        self.ladder = space.ladder(target, context=context)
        self._rungs = {space.label(config) for _, config in self.ladder}

    # -- trials

    def remember(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._seen.add(self._space.label(trial.config))

    def is_seen(self, config: Config) -> bool:
        return self._space.label(config) in self._seen

    def is_baseline(self, config: Config) -> bool:
        return self._space.label(config) == self._space.label(self._space.baseline)

    def feasible(self) -> list[Trial]:
        return [t for t in self.trials if t.status is Status.COMPLETE]

    def best(self) -> Trial | None:
        feasible = self.feasible()
        return self.best_of(feasible) if feasible else None

    def best_of(self, trials: Sequence[Trial]) -> Trial:
        return functools.reduce(lambda a, b: b if self._evaluator.objective.is_better(b, a) else a, trials)

    def best_uniform(self) -> Sequence[Trial]:
        """Feasible trials without codecs of their own by layer that are as small as the best of them."""
        uniform = [t for t in self.feasible() if "layer_codecs" not in t.config]
        if not uniform:
            return []
        size = self.best_of(uniform).bytes_per_token or 0.0
        return [t for t in uniform if t.bytes_per_token is not None and t.bytes_per_token <= size * (1 + TIE)]

    # -- what could still win

    def is_open(self, config: Config) -> bool:
        """Not tried, not known to fail the gate, not beaten by its size alone."""
        if self.is_seen(config) or not self.is_passing(config):
            return False
        size = self._evaluator.bytes_per_token(config)
        return size is not None and self._evaluator.objective.can_beat(size, self.best())

    def is_new_rung(self, config: Config) -> bool:
        """A step of the first ladder that was not tried: worth listing even where it is ruled out."""
        return self._space.label(config) in self._rungs and not self.is_seen(config)

    def is_passing(self, config: Config) -> bool:
        """Not ruled out by the gate; unknown counts as passing, the confirmation will tell."""
        known = self._evaluator.verdicts.get(self._space.read_key(config))
        return known is None or may_pass(known)

    def is_ladder_done(self) -> bool:
        tested = {self._space.read_key(t.config) for t in self.trials}
        return all(self._space.read_key(config) in tested for _, config in self.ladder)

    def add_rung(self, num_bytes: float, config: Config) -> None:
        self.ladder.append((num_bytes, dict(config)))
        self.ladder.sort(key=lambda rung: (-rung[0], self._space.label(rung[1])))

    def smaller_rungs(self, config: Config) -> list[tuple[float, dict[str, Any]]]:
        size = self._evaluator.bytes_per_token(config) or 0.0
        return [(b, c) for b, c in self.ladder if b < size * (1 - 1e-6)]

    def candidates(self) -> list[Trial]:
        """What could be the recipe, best first: feasible trials and the rungs above them.

        A rung larger than the search's best was pruned unmeasured; it counts once that best falls. Where
        the search found nothing feasible, rungs of unknown effect are tried from the middle.
        """
        objective = self._evaluator.objective
        baseline = next(t for t in self.trials if self.is_baseline(t.config))
        tried = {self._space.label(t.config) for t in self.trials if t.status is not Status.PRUNED}
        rungs = [
            Trial(number=-1, config=config, status=Status.PRUNED,
                  metrics={"kv_bytes_per_token": size, "num_changed": self._space.num_changed(config)})
            for size, config in self.ladder
            if self._space.label(config) not in tried and self.is_passing(config)
        ]  # fmt: skip
        feasible = [t for t in self.feasible() if not self.is_baseline(t.config)]
        better = [t for t in feasible if objective.is_better(t, baseline)]
        if not better or objective.has_slo:
            return better or bisecting([t for t in rungs if objective.is_better(t, baseline)])
        smallest = min(t.bytes_per_token or 0.0 for t in better)
        above = [t for t in rungs if (t.bytes_per_token or 0.0) >= smallest]
        better += [t for t in above if objective.is_better(t, baseline)]
        return sorted(better, key=functools.cmp_to_key(lambda a, b: -1 if objective.is_better(a, b) else 1))

    def undecided_below(self, config: Config) -> list[Config]:
        """Smaller rungs that the search judged and could not decide, largest first: more requests may."""
        found: list[Config] = []
        for _, rung in self.smaller_rungs(config):
            known = self._evaluator.verdicts.get(self._space.read_key(rung))
            if known is not None and known["verdict"] == Verdict.UNDECIDED.value and may_pass(known):
                found.append(rung)
        return found

    def failing_step(
        self, confirmed: Confirmed | None, rejected: Sequence[Confirmed]
    ) -> Mapping[str, Any] | None:
        """The largest configuration below the winner that the gate did not pass."""
        winner = self._space.baseline if confirmed is None else confirmed.config
        by_key = {
            self._space.read_key(c.config): c for c in rejected if c.quality.verdict is not Verdict.PASS
        }
        for size, config in self.smaller_rungs(winner):
            key = self._space.read_key(config)
            known = by_key[key].quality.to_dict() if key in by_key else self._evaluator.verdicts.get(key)
            if known is not None and known["verdict"] != Verdict.PASS.value:
                return {"config": config, "metrics": {"kv_bytes_per_token": size}, "quality": dict(known)}
        return None


def bisecting(rungs: Sequence[T]) -> list[T]:
    """Middle first, then the middles of both halves: a pass prunes all above, a fail points upwards."""
    order: list[T] = []
    spans = [(0, len(rungs))]
    while spans:
        low, high = spans.pop(0)
        if low < high:
            middle = (low + high) // 2
            order.append(rungs[middle])
            spans += [(middle + 1, high), (low, middle)]
    return order
