"""From measurements to what people read: gains with intervals, requests held, result.json and the recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtune._version import __version__
from kvtune.quality import Estimate, Slo, SpeedRatios, Verdict, summarise
from kvtune.recipe import DEFAULT_VOIDED_BY, Recipe, codec_constants_sha256, configuration_of
from kvtune.target import Config, LoadReport, Target
from kvtune.tune.ablation import importance
from kvtune.tune.confirmation import Confirmed
from kvtune.tune.evaluation import Baseline, plain
from kvtune.tune.held import RequestBytes, held_in, within_slo
from kvtune.tune.settings import TuneSettings
from kvtune.tune.squeeze import SqueezeProof, as_json
from kvtune.tune.trial import Trial
from kvtune.workload import TokenRequest

__all__ = ["Outcome", "is_better_confirmed"]

MIN_BYTES_SAVED = 0.005
MIN_SPEED_GAIN = 0.03


def gain_entry(ratio: float, low: float, high: float, *, significant: bool, n: int) -> dict[str, Any]:
    bounds = {"ratio": ratio, "low": low, "high": high}
    return {**{k: plain(float(v)) for k, v in bounds.items()}, "significant": significant, "n": n}


def gains(bytes_ratio: float, held: Estimate, ratios: SpeedRatios, aa: SpeedRatios) -> dict[str, Any]:
    """Winner / baseline by metric; bytes are exact."""
    r = bytes_ratio
    exact = {
        "kv_bytes_per_token": gain_entry(r, r, r, significant=abs(r - 1) > MIN_BYTES_SAVED, n=1),
        "requests_held": gain_entry(
            held.value, held.low, held.high, significant=held.low > 1 or held.high < 1, n=held.n
        ),
    }
    return exact | speed_gains(ratios, aa)


def speed_gains(ratios: SpeedRatios, aa: SpeedRatios) -> dict[str, Any]:
    """Winner / baseline by metric of speed: what counts lies beyond its interval and the A/A's."""
    return {
        name: gain_entry(e.value, e.low, e.high, significant=_is_significant(name, ratios, aa), n=e.n)
        for name, e in ratios.ratios.items()
    }


def _is_significant(name: str, ratios: SpeedRatios, aa: SpeedRatios) -> bool:
    """Beyond its own interval, beyond what the baseline shows against itself, and large enough to matter.

    Requests of one run share its disturbances, so a run's own interval is too narrow; the A/A pair is not.
    """
    found, noise = ratios.ratios.get(name), aa.ratios.get(name)
    if found is None or noise is None or not noise.low > 0:
        return False
    spread = max(1 + MIN_SPEED_GAIN, noise.high, 1 / noise.low)
    return found.low > spread or found.high < 1 / spread


def is_better_confirmed(confirmed: Confirmed, *, bytes_ratio: float, has_slo: bool) -> bool:
    """Whether a confirmed candidate is worth changing anything for."""
    goodput = confirmed.ratios.ratios.get("goodput")
    is_more = goodput is not None and goodput.value > 1  # significant alone could mean worse
    is_faster = is_more and _is_significant("goodput", confirmed.ratios, confirmed.aa)
    if has_slo:
        return is_faster
    return bytes_ratio < 1 - MIN_BYTES_SAVED or (abs(bytes_ratio - 1) <= MIN_BYTES_SAVED and is_faster)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything known when a run ends. `confirmed`: the winner, None when the baseline stays."""

    target: Target
    settings: TuneSettings
    identity: Mapping[str, Any]
    requests: Sequence[TokenRequest]
    search: Baseline
    baseline_config: Config
    baseline_reports: Sequence[LoadReport]
    aa: SpeedRatios
    confirmed: Confirmed | None
    rejected: Sequence[Confirmed]
    trials: Sequence[Trial]
    failing_step: Mapping[str, Any] | None
    stop_reason: str
    elapsed_s: float
    recipe_path: str
    split: Mapping[str, int]
    squeeze: SqueezeProof | None = None
    """What was proven about low planes of the winner, where that was asked for."""
    further: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Evidence beside the verdict, as `tune.evidence` records it."""

    @property
    def winner_config(self) -> Config:
        return self.baseline_config if self.confirmed is None else self.confirmed.config

    def _bytes(self, config: Config) -> float:
        return self.target.kv_bytes_per_token(config, context=self.settings.context)

    @property
    def kv_budget_bytes(self) -> int:
        """The budget asked for, else what the baseline's engine took."""
        if self.settings.kv_budget_bytes is not None:
            return self.settings.kv_budget_bytes
        tokens = float(self.search.effective.get("kv_capacity_tokens") or 0)
        return int(tokens * self.search.bytes_per_token)

    def _held(self) -> tuple[dict[str, Any], Estimate]:
        """Requests of the workload's lengths that the KV budget holds at once, per side, and their ratio.

        `value` is predicted from allocator bytes, its bounds say how much the mix of requests matters;
        `measured` divides the running engine's own capacity by the mean length.
        """
        sizes = RequestBytes(self.requests)
        rngs = [np.random.default_rng(self.settings.seed) for _ in range(3)]  # both sides by the same draws
        per_side = [sizes.under(functools.partial(self._bytes_at, config)) for config in self._configs()]
        mean_length = float(np.mean(sizes.lengths))
        out: dict[str, Any] = {"kv_budget_bytes": self.kv_budget_bytes}
        effective = self.search.effective if self.confirmed is None else self.confirmed.effective
        for side, mine, live, rng in (
            ("baseline", per_side[0], self.search.effective, rngs[0]),
            ("winner", per_side[1], effective, rngs[1]),
        ):
            tokens = live.get("kv_capacity_tokens")
            out[side] = {
                **held_in(self.kv_budget_bytes, mine, sizes.sessions, rng), "source": "predicted from sizes",
                "measured": None if tokens is None else round(float(tokens) / mean_length, 2),
                "measured_source": "capacity of the running engine, mean length",
            }  # fmt: skip
        return out, sizes.ratio(per_side[0], per_side[1], rngs[2])

    def _configs(self) -> tuple[Config, Config]:
        return self.baseline_config, self.winner_config

    def _bytes_at(self, config: Config, context: int) -> float:
        return self.target.kv_bytes_per_token(config, context=context)

    def _within_slo(self) -> dict[str, Any]:
        """Requests of the load that met the SLO asked for, or, without one, the limit the search applies to
        the baseline's own p95."""
        slo = self.settings.slo
        asked = slo is not None
        if slo is None:
            limit, seen = self.settings.latency_limit, summarise(self.baseline_reports, Slo())
            p95 = {name: seen[name]["p95"] for name in ("ttft_s", "tpot_s")}
            slo = Slo(**{f"{name[:-2]}_p95_s": limit * v for name, v in p95.items() if v is not None})
        reports = self.baseline_reports if self.confirmed is None else self.confirmed.reports
        return {
            "slo": {"ttft_s": slo.ttft_p95_s, "tpot_s": slo.tpot_p95_s, "is_asked": asked,
                    "factor": None if asked else self.settings.latency_limit},
            "baseline": within_slo(self.baseline_reports, slo), "winner": within_slo(reports, slo),
        }  # fmt: skip

    def _side(
        self, config: Config, reports: Sequence[LoadReport], effective: Mapping[str, Any]
    ) -> dict[str, Any]:
        speed = summarise(reports, self.settings.slo or Slo())
        rate, price = speed["output_tokens_per_s"], self.settings.price_per_hour
        if price is not None and rate:
            speed["cost_per_million_tokens"] = price / 3600 / rate * 1e6
        return {
            "config": dict(config),
            "metrics": {"kv_bytes_per_token": self._bytes(config), **speed},
            "effective": dict(effective),
        }  # fmt: skip

    def quality(self) -> dict[str, Any]:
        if self.confirmed is not None:
            return self.confirmed.quality.to_dict()
        notes = ["generic: text is synthetic"] if self.settings.is_synthetic_text else []
        return {
            "verdict": Verdict.PASS.value, "reason": "the baseline itself: nothing changes", "proven": True,
            "lossless": True, "bit_equal": True, "margin": self._margin(), "metrics": {}, "strata": [],
            "synthetic_text": self.settings.is_synthetic_text,
            "notes": notes,
        }  # fmt: skip

    def _margin(self) -> dict[str, Any]:
        return self.settings.limits.to_dict()

    def record(self) -> dict[str, Any]:
        """The content of result.json, and of `kvtune tune --json`."""
        base = self._side(self.baseline_config, self.baseline_reports, self.search.effective)
        winner = {**base, "is_baseline": True}
        if self.confirmed is not None:
            found = self.confirmed
            winner = {**self._side(found.config, found.reports, found.effective), "is_baseline": False}
        bytes_ratio = self._bytes(self.winner_config) / self._bytes(self.baseline_config)
        held, held_ratio = self._held()
        base["held"], winner["held"] = held["baseline"], held["winner"]
        ratios = SpeedRatios(ratios={}) if self.confirmed is None else self.confirmed.ratios
        return plain({
            "schema_version": 1,
            "status": "no_significant_gain" if self.confirmed is None else "winner",
            "recipe": self.recipe_path,
            "baseline": base, "winner": winner,
            "gain": gains(bytes_ratio, held_ratio, ratios, self.aa),
            "quality": self.quality(),
            "speed_verdict": "PASS" if self.confirmed is None else self.confirmed.speed_verdict,
            "aa_noise": self._aa_noise(),
            "held": held, "within_slo": self._within_slo(),
            "smallest_failing_step": self.failing_step,
            "rejected": [{"config": c.config, "reason": c.rejected, "quality": c.quality.to_dict(),
                          "ratios": c.ratios.to_dict()} for c in self.rejected],
            "squeeze": None if self.squeeze is None else self.squeeze.to_dict(),
            **self.further, "importance": importance(self.trials),
            "trials": [t.to_dict() for t in self.trials],
            "context": self.settings.context,
            "objective": self._objective(), "margin": self._margin(),
            "stop_reason": self.stop_reason,
            "identity": self.identity, "workload": {**self.settings.workload, **self.split,
                "is_synthetic_text": self.settings.is_synthetic_text},
            "limits": self._limits(), "voided_by": list(DEFAULT_VOIDED_BY), "fallback": self._fallback(),
            "price_per_hour": self.settings.price_per_hour,
            "budget_s": self.settings.budget_s, "elapsed_s": self.elapsed_s, "seed": self.settings.seed,
            "kvtune_version": __version__, "command": self.settings.command,
            "created_at": self.settings.created_at, "next_command": self._next_command(),
            "intervals": "low and high are one-sided 95 % bounds each (90 % together)",
        })  # fmt: skip

    def _next_command(self) -> str:
        engine = "vllm" if self.target.name == "vllm" else "transformers"
        return f"kvtune emit {self.recipe_path} --target {engine}"

    def _aa_noise(self) -> dict[str, Any]:
        floors: dict[str, float] = {}
        if self.confirmed is not None:
            floors = {f"{m.name}_floor": m.floor for m in self.confirmed.quality.metrics}
        return {**self.aa.to_dict(), **floors}

    def _objective(self) -> dict[str, Any]:
        slo = self.settings.slo
        if slo is not None:
            return {"maximise": "requests within the SLO when all arrive together", "subject_to": "gate PASS",
                    "slo": {"ttft_p95_s": slo.ttft_p95_s, "tpot_p95_s": slo.tpot_p95_s}}  # fmt: skip
        return {
            "minimise": "allocator bytes per token", "context": self.settings.context,
            "subject_to": f"gate PASS, upper bounds of TPOT and p95 TTFT <= {self.settings.latency_limit:g}x",
            "ties": "goodput",
        }  # fmt: skip

    def _limits(self) -> list[str]:
        plan, replay = self.search.plan, self.settings.replay
        limits = [
            f"load runs: {len(plan.source)} requests, answers of at most {plan.max_tokens} tokens, "
            f"recorded times x {plan.arrival_scale:.3g}",
            f"quality: answers of at most {replay.max_tokens} tokens, "
            f"{self.search.num_quality} requests in the search",
        ]
        if self.confirmed is not None and self.confirmed.speed_verdict != "PASS":
            limited = ("tpot_s.mean", "ttft_s.p95")
            found = [(name, r) for name, r in self.confirmed.ratios.ratios.items() if name in limited]
            worst = max(found, key=lambda item: item[1].high)
            limits.append(
                f"speed is not proven: the upper bound of {worst[0]} is {worst[1].high:.3g}x, above "
                f"{self.settings.latency_limit:g}x; the noise of this run does not allow a decision"
            )
        return limits

    def _fallback(self) -> dict[str, Any]:
        return {
            "configuration": dict(self.baseline_config),
            "trigger": "any voiding change, or `kvtune check` no longer says PASS",
            "thresholds": self._margin(),
        }

    def recipe(self, record: Mapping[str, Any]) -> Recipe:
        """The recipe of the winner (or of the baseline), with its evidence."""
        effective: Mapping[str, Any] = record["winner"]["effective"]
        return Recipe(
            model=self.identity["model"], hardware=self.identity["hardware"],
            engine={"name": self.target.name, **self.identity["engine"]},
            workload=record["workload"], read_contract=str(effective.get("read_contract", "T0")),
            kernel=str(effective.get("kernel", "")), codec_constants_sha256=codec_constants_sha256(),
            configuration=configuration_of(
                self._served(), kv_budget_bytes=self.kv_budget_bytes or None, engine=self.settings.engine
            ),
            baseline={"configuration": dict(self.baseline_config), "metrics": record["baseline"]["metrics"]},
            evidence=self._evidence(record), quality=self._proof(record), fallback=record["fallback"],
            created_at=self.settings.created_at,
            provenance={"kvtune_version": record["kvtune_version"], "seed": self.settings.seed,
                        "budget_s": self.settings.budget_s, "command": self.settings.command,
                        "margin": record["margin"], "objective": record["objective"],
                        "status": record["status"], "speed_verdict": record["speed_verdict"],
                        "effective": effective},
        )  # fmt: skip

    def _served(self) -> dict[str, Any]:
        """The winner's settings, and the low planes that may go."""
        planes = {} if self.squeeze is None else as_json(self.squeeze.planes)
        return {**self.winner_config, **({"squeeze_planes": planes} if planes else {})}

    def _proof(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The verdict on what is served, and beside it the one on reading without the planes that may go."""
        found = record["squeeze"]
        if found is None or not found["planes"]:
            return record["quality"]
        return {**record["quality"], "squeeze": {"planes": found["planes"], **found["quality"]}}

    def _evidence(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Every measured figure with its n and interval, and where it comes from."""
        out: dict[str, Any] = {
            f"gain.{name}": {
                "value": e["ratio"], "low": e["low"], "high": e["high"], "n": e["n"],
                "significant": e["significant"], "unit": "ratio",
                "source": "predicted" if name in ("kv_bytes_per_token", "requests_held") else "measured",
            }
            for name, e in record["gain"].items()
        }  # fmt: skip
        for side in ("baseline", "winner"):
            held = record["held"][side]
            out[f"{side}.requests_held"] = {"value": held["value"], "n": len(self.requests),
                                            "source": held["source"],
                                            "measured": held["measured"]}  # fmt: skip
            out[f"{side}.kv_bytes_per_token"] = {
                "value": record[side]["metrics"]["kv_bytes_per_token"], "n": 1, "unit": "bytes",
                "source": "predicted", "read_back": record[side]["effective"].get("kv_bytes_per_token"),
            }  # fmt: skip
        return out
