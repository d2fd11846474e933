"""The search for codecs layer by layer: sensitivities, the knapsack, and the smallest budget the gate passes.

Searched is one number, the byte budget. For each, the knapsack proposes a table; the gate's replay judges it
whole, since harms do not add up exactly. A table that fails is repaired greedily, its most harmful side one
step larger, until it passes or takes no fewer bytes than the best so far. Then the budget is bisected between
the largest that failed and the smallest that passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtune.target import AllocatesLayers, Config, Target
from kvtune.tune.allocation import SIDES, Allocation, Unit, frontier, options_of, raised
from kvtune.tune.evaluation import Evaluator, is_likely
from kvtune.tune.pace import Pace
from kvtune.tune.sensitivity import Sensitivities, SideMeter
from kvtune.tune.settings import TuneSettings
from kvtune.tune.space import SearchSpace, with_layers
from kvtune.tune.trial import Status, Trial

__all__ = ["LayerSearch", "LayerSearchResult", "LayerTable", "kl_of", "layer_record"]

MEASURE_SHARE = 0.6
"""Of the seconds given, what may go into sensitivities; the rest judges tables."""
MAX_TABLES = 12
START_SHARE = 0.8
"""The first budget judged is the smallest at which the predicted KL takes at most so much of the margin."""
HOPELESS = 4.0
"""Tables predicted at more than this many margins are not judged: sums of isolated KL err by less."""
MIN_SAVED = 0.01
"""Share of the anchor's bytes below which a table is not worth its complexity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """A judged table. `budget`, `num_bytes`: per token at the reference context; `repairs`: sides raised
    since the knapsack proposed it."""

    config: Mapping[str, Any]
    budget: float
    num_bytes: float
    predicted_kl: float
    quality: Mapping[str, Any]
    repairs: int

    @property
    def is_passing(self) -> bool:
        """On the search half, as far as it can tell."""
        return is_likely(self.quality)

    def to_dict(self) -> dict[str, Any]:
        kl = self.quality.get("metrics", {}).get("kl", {}).get("excess", {})
        return {
            "config": dict(self.config), "budget_bytes_per_token": self.budget,
            "bytes_per_token": self.num_bytes, "predicted_kl": self.predicted_kl, "kl": kl.get("value"),
            "kl_high": kl.get("high"), "verdict": self.quality["verdict"],
            "reason": self.quality.get("reason", ""), "repairs": self.repairs,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSearchResult:
    """`skipped`: why there is no table, empty otherwise. `tables`: in the order they were judged."""

    anchor: Mapping[str, Any]
    anchor_bytes: float
    skipped: str = ""
    sensitivities: Sensitivities | None = None
    tables: tuple[LayerTable, ...] = ()

    @property
    def passing(self) -> list[LayerTable]:
        """Those that passed, fewest bytes first."""
        return sorted((t for t in self.tables if t.is_passing), key=lambda t: t.num_bytes)

    def to_dict(self) -> dict[str, Any]:
        found = self.sensitivities
        return {
            "anchor": dict(self.anchor), "anchor_bytes_per_token": self.anchor_bytes,
            "skipped": self.skipped, "tables": [t.to_dict() for t in self.tables],
            "num_requests": 0 if found is None else found.num_requests,
            "units": [] if found is None else [list(unit) for unit in found.units],
            "sensitivities": [] if found is None else [s.to_dict() for s in found.isolated],
            "whole_side": [] if found is None else [s.to_dict() for s in found.wide],
        }  # fmt: skip


class LayerSearch:
    """One search from one anchor: the smallest uniform configuration that passed. `left_s`: its seconds."""

    def __init__(
        self, target: Target, space: SearchSpace, settings: TuneSettings, *, evaluator: Evaluator, pace: Pace,
        rng: np.random.Generator, left_s: Callable[[], float], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._target, self._space, self._settings = target, space, settings
        self._evaluator, self._pace, self._rng = evaluator, pace, rng
        self._left_s, self._say = left_s, say
        self._tables: dict[tuple[int, ...], LayerTable] = {}

    def run(self, anchor: Config) -> LayerSearchResult:
        """Sensitivities around `anchor`, then tables judged on the search half."""
        target, settings = self._target, self._settings
        size = target.kv_bytes_per_token(anchor, context=settings.context)
        if not isinstance(target, AllocatesLayers):
            return LayerSearchResult(
                anchor=anchor, anchor_bytes=size, skipped="the engine has one codec for all"
            )
        until = self._left_s() * (1 - MEASURE_SHARE)
        meter = SideMeter(
            target, target.layer_codecs(), anchor, self._evaluator.baseline.reference, settings=settings,
            pace=self._pace, rng=self._rng, left_s=lambda: self._left_s() - until,
        )  # fmt: skip
        self._say("what each layer and side loses at fewer bits")
        found = meter.measure()
        if isinstance(found, str):
            return LayerSearchResult(anchor=anchor, anchor_bytes=size, skipped=found)
        self._search(anchor, self._units(anchor, found))
        return LayerSearchResult(
            anchor=anchor, anchor_bytes=size, sensitivities=found, tables=tuple(self._tables.values())
        )

    def trial(self, number: int, table: LayerTable, best: Trial | None) -> Trial:
        """A judged table as a trial. One that passed runs its loads if it can still win and time is left."""
        if table.is_passing and self._left_s() > self._pace.cost_s("trial"):
            return self._evaluator.evaluate(number, table.config, best)
        reason = "no time is left for its load" if table.is_passing else str(table.quality.get("reason", ""))
        return Trial(
            number=number, config=table.config, quality=table.quality,
            status=Status.PRUNED if table.is_passing else Status.INFEASIBLE,
            reason=reason if table.is_passing else f"{table.quality['verdict']}: {reason}",
            metrics={"kv_bytes_per_token": table.num_bytes,
                     "num_changed": self._space.num_changed(table.config)},
        )  # fmt: skip

    # -- bytes

    def _bytes(self, config: Config) -> int:
        """Allocator bytes of one sequence at the reference context."""
        context = self._settings.context
        return round(self._target.kv_bytes_per_token(config, context=context) * context)

    def _units(self, anchor: Config, found: Sensitivities) -> list[Unit]:
        base = self._bytes(anchor)
        units: list[Unit] = []
        for layers in found.units:
            harms = [found.harms(layers, side) for side in SIDES]
            sizes = {
                (k, v): self._bytes({**anchor, "layer_codecs": {str(n): [k, v] for n in layers}}) - base
                for k in harms[0]
                for v in harms[1]
            }
            units.append(Unit(layers=layers, options=options_of(harms, sizes)))
        return units

    # -- budgets

    def _search(self, anchor: Config, units: Sequence[Unit]) -> None:
        limit = self._settings.limits.kl
        known = self._evaluator.verdicts.get(self._space.read_key(anchor), {})
        spent = kl_of(known)
        problem = _Problem(anchor=anchor, units=units, num_bytes=self._bytes(anchor), spent=spent)
        worth = -MIN_SAVED * problem.num_bytes
        front = [a for a in frontier(units) if a.num_bytes <= worth and spent + a.harm <= HOPELESS * limit]
        mild = [a for a in front if spent + a.harm <= START_SHARE * limit]
        proposal = mild[-1] if mild else (front[0] if front else None)
        failed, passed = float("-inf"), 0.0
        while proposal is not None and self._has_room():
            found = self._repaired(problem, proposal, passed)
            if found is None:
                return
            table, allocation = found
            if table.is_passing:
                passed = min(passed, allocation.num_bytes)
            if not table.is_passing or table.repairs:
                failed = max(failed, proposal.num_bytes)
            proposal = _between(front, failed, passed, self._tables)
        self._judge_spare(problem, front, passed)

    def _judge_spare(self, problem: _Problem, front: Sequence[Allocation], passed: float) -> None:
        """One more table, half-way between the smallest that passed and the anchor: what is confirmed next
        if requests the search never saw refute the smallest."""
        spare = _between(front, passed, 0, self._tables)
        if passed < 0 and spare is not None and self._has_room():
            self._judge(problem, spare, budget=spare.num_bytes, repairs=0)

    def _repaired(
        self, problem: _Problem, proposal: Allocation, passed: float
    ) -> tuple[LayerTable, Allocation] | None:
        """The proposal, or what passes once its most harmful sides are larger; None if it does not run.

        The last table judged is returned whether it passes or not; none takes `passed` bytes or more.
        """
        allocation, repairs = proposal, 0
        while True:
            table = self._judge(problem, allocation, budget=proposal.num_bytes, repairs=repairs)
            if table is None or table.is_passing:
                return None if table is None else (table, allocation)
            higher = raised(problem.units, allocation)
            if higher is None or higher.num_bytes >= passed or not self._has_room():
                return table, allocation
            allocation, repairs = higher, repairs + 1

    def _has_room(self) -> bool:
        count = len(self._evaluator.baseline.reference.items)
        cost = self._pace.cost_s("start") + self._pace.cost_s("replay", count)
        return len(self._tables) < MAX_TABLES and self._left_s() > cost

    def _judge(
        self, problem: _Problem, allocation: Allocation, *, budget: int, repairs: int
    ) -> LayerTable | None:
        """The gate's replay of the whole table on the search half; None if it does not run."""
        known = self._tables.get(allocation.choice)
        if known is not None:
            return known
        config = with_layers(problem.anchor, allocation.table(problem.units))
        context = self._settings.context
        size = self._bytes(config) / context
        self._say(f"replaying a table of {size:,.0f} bytes per token")
        quality = self._evaluator.probe_quality(config)
        if quality is None:
            return None
        table = LayerTable(
            config=config, budget=(problem.num_bytes + budget) / context, num_bytes=size,
            predicted_kl=problem.spent + allocation.harm, quality=quality, repairs=repairs,
        )  # fmt: skip
        self._tables[allocation.choice] = table
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """`num_bytes` of the anchor at the reference context; `spent`: its KL above the A/A floor."""

    anchor: Config
    units: Sequence[Unit]
    num_bytes: int
    spent: float


def _between(
    front: Sequence[Allocation], failed: float, passed: float, known: Mapping[tuple[int, ...], LayerTable]
) -> Allocation | None:
    """The middle budget between those known to fail and to pass."""
    open_ = [a for a in front if failed < a.num_bytes < passed and a.choice not in known]
    return open_[len(open_) // 2] if open_ else None


def kl_of(quality: Mapping[str, Any] | None) -> float:
    """Mean KL above the A/A floor [nats per token] of a verdict's record; 0 where every bit was equal."""
    return float((quality or {}).get("metrics", {}).get("kl", {}).get("excess", {}).get("value") or 0.0)


def layer_record(
    target: Target, found: LayerSearchResult | None, winner: Config, *, context: int
) -> dict[str, Any] | None:
    """What a report shows: the search, and where the bytes of one table went, by layer and side.

    That table is the winner's if it has one, else the smallest that passed, else the anchor.
    """
    if found is None or not isinstance(target, AllocatesLayers):
        return None
    is_winner = "layer_codecs" in winner
    shown: Config = winner if is_winner else found.passing[0].config if found.passing else found.anchor
    table = shown.get("layer_codecs", {})
    harms: dict[tuple[int, str, str], Mapping[str, Any]] = {}
    for s in found.sensitivities.isolated if found.sensitivities else ():
        harms |= {(layer, s.side, s.codec): s.to_dict() for layer in s.layers}
    sides: list[dict[str, Any]] = []
    for layer, sizes in sorted(target.kv_side_bytes_per_token(shown, context=context).items()):
        pair = table.get(str(layer), (shown["k_codec"], shown["v_codec"]))
        for side, codec, size in zip(SIDES, pair, sizes, strict=True):
            entry = harms.get((layer, side, codec))
            sides.append({"layer": layer, "side": side, "codec": codec, "bytes_per_token": size,
                          "kl": None if entry is None else entry["kl"]})  # fmt: skip
    total = target.kv_bytes_per_token(shown, context=context)
    return {
        **found.to_dict(), "is_winner": is_winner, "shown": dict(shown), "bytes_per_token": total,
        "sides": sides, "padding_bytes_per_token": total - sum(side["bytes_per_token"] for side in sides),
    }  # fmt: skip
