"""The winner one setting at a time: what each change is worth, measured with that one back at the baseline.

    winner k=int8 v=int8   ->   k=bf16 v=int8 (what K contributes),  k=int8 v=bf16 (what V contributes)

On the SEARCH half, with the funnel's own loads and replay, so that what the search measured is taken as it
is. Settings interact: contributions need not add up to the whole, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kvtune.recipe import canonical_json
from kvtune.target import Config
from kvtune.tune.evaluation import Evaluator
from kvtune.tune.pace import Pace
from kvtune.tune.space import SearchSpace
from kvtune.tune.trial import Status, Trial

__all__ = ["Ablation", "changed_settings", "importance"]

BUDGET_SHARE = 0.1
"""Of the whole budget, what may be set aside for it at most."""
SAFETY = 1.25


def changed_settings(config: Config, baseline: Config) -> list[str]:
    """Names of the settings in which a configuration differs from the baseline."""
    return [name for name in config if config[name] != baseline.get(name)]


class Ablation:
    """Measures the variants of one winner. `trials`: what the search knows already."""

    def __init__(
        self, evaluator: Evaluator, space: SearchSpace, trials: Sequence[Trial], *, pace: Pace
    ) -> None:
        self._evaluator, self._space, self._pace = evaluator, space, pace
        self._known = {
            _key(t.config): t for t in trials if t.status is not Status.PRUNED and "tpot_s" in t.metrics
        }

    def cost_s(self, config: Config) -> float:
        """Seconds to set aside for the variants of `config` that the search did not measure."""
        variants = [config, *(self._without(config, name) for name in self._changed(config))]
        unknown = sum(_key(variant) not in self._known for variant in variants)
        return min(
            BUDGET_SHARE * self._pace.budget_s, SAFETY * unknown * self._pace.cost_s("trial"),
        )  # fmt: skip

    def record(self, winner: Config) -> dict[str, Any]:
        """`{"winner": row, "variants": [row]}`, one row per changed setting; `skipped` names settings without
        time. A row: setting, value, baseline_value, config, metrics, ratios, quality, source."""
        rows: list[dict[str, Any]] = []
        skipped: list[str] = []
        whole = self._measured(winner)
        for name in self._changed(winner):
            variant = self._without(winner, name)
            found = self._measured(variant)
            if found is None:
                skipped.append(name)
                continue
            row = _row(found, self._source(found))
            rows.append({"setting": name, "value": winner[name],
                         "baseline_value": self._space.baseline.get(name), **row})  # fmt: skip
        return {
            "winner": None if whole is None else _row(whole, self._source(whole)),
            "variants": rows, "skipped": skipped,
            "note": "measured on the search half, each against the same baseline runs; settings interact, so "
            "contributions need not add up",
        }  # fmt: skip

    def _changed(self, config: Config) -> list[str]:
        return changed_settings(config, self._space.baseline)

    def _without(self, config: Config, name: str) -> dict[str, Any]:
        """The configuration with one setting back at the baseline (or gone, if the baseline has none)."""
        variant = {key: value for key, value in config.items() if key != name}
        if name in self._space.baseline:
            variant[name] = self._space.baseline[name]
        if name in _SIDES and "layer_codecs" in variant:
            variant |= _table_without(variant, _SIDES[name], variant[name])
        kept = [key for key in config if variant.get(key) not in (None, {})]
        return {key: variant[key] for key in kept}

    def _measured(self, config: Config) -> Trial | None:
        """A trial of the search, else a new measurement; None without time for it."""
        known = self._known.get(_key(config))
        if known is not None:
            return known
        if self._pace.left_s < SAFETY * self._pace.cost_s("trial"):
            return None
        return self._evaluator.evaluate(-1, config, None)

    def _source(self, trial: Trial) -> str:
        return "measured for this table" if trial.number < 0 else f"trial {trial.number} of the search"


_SIDES = {"k_codec": 0, "v_codec": 1}


def _table_without(config: Config, side: int, codec: Any) -> dict[str, Any]:
    """The table of layers that differ from `k_codec` and `v_codec`, one side of each set to `codec`."""
    common = [config["k_codec"], config["v_codec"]]
    table = {
        layer: [codec if i == side else each for i, each in enumerate(pair)]
        for layer, pair in dict(config["layer_codecs"]).items()
    }
    return {"layer_codecs": {layer: pair for layer, pair in table.items() if pair != common}}


def _key(config: Config) -> str:
    return canonical_json(dict(config))


def _row(trial: Trial, source: str) -> Mapping[str, Any]:
    return {
        "config": dict(trial.config), "metrics": dict(trial.metrics), "ratios": dict(trial.ratios),
        "quality": None if trial.quality is None else dict(trial.quality), "status": trial.status.value,
        "reason": trial.reason, "source": source,
    }  # fmt: skip


def importance(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Per setting that varied: the share of the spread of KV bytes, log KL and TPOT over trials that its
    values explain alone (eta squared), None where a result has no spread. A hint: no balanced design."""
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for trial in trials for name in trial.config):
        values = {canonical_json(t.config.get(name)) for t in trials}
        if len(values) > 1:
            shares = {key: _explained(trials, name, of) for key, of in _RESULTS.items()}
            found.append({"setting": name, "num_values": len(values), **shares})
    return found


def _explained(trials: Sequence[Trial], name: str, of: Callable[[Trial], float | None]) -> float | None:
    pairs = [(canonical_json(t.config.get(name)), of(t)) for t in trials]
    groups: dict[str, list[float]] = {}
    for value, result in pairs:
        if result is not None:
            groups.setdefault(value, []).append(result)
    everything = np.array([x for group in groups.values() for x in group])
    if len(everything) < 3 or len(groups) < 2:
        return None
    total = float(((everything - everything.mean()) ** 2).sum())
    if total <= 1e-12 * max(1.0, float((everything**2).sum())):
        return None
    inside = sum(float(((np.array(g) - np.mean(g)) ** 2).sum()) for g in groups.values())
    return min(1.0, max(0.0, 1 - inside / total))


def _log_kl(trial: Trial) -> float | None:
    kl = ((trial.quality or {}).get("metrics") or {}).get("kl") or {}
    value = (kl.get("excess") or {}).get("value")
    return None if value is None or value <= 0 else math.log(value)


def _mean_tpot(trial: Trial) -> float | None:
    found = (trial.metrics.get("tpot_s") or {}).get("mean")
    return None if found is None else float(found)


_RESULTS: Mapping[str, Callable[[Trial], float | None]] = {
    "bytes": lambda trial: trial.bytes_per_token,
    "kl": _log_kl,
    "tpot": _mean_tpot,
}
