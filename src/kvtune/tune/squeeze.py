"""Which low planes of the winner may go while memory is short: what a recipe calls `squeeze_planes`.

Chosen on the requests of the search, each side read alone at 4 bits and then the mildest together; proven on
those it never saw, by the whole gate with all of these planes gone at once: a squeeze can only do less.
The claim is one of its own beside the winner's, so it has its own chance of a false PASS, shared by the sets
that are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtune.quality import (
    Gate,
    QualityVerdict,
    Reference,
    SharedError,
    Verdict,
    isolated_kl,
    judge,
    judge_candidate,
    replay,
)
from kvtune.target import AllocatesLayers, Config, ReadsPlanes, RunningTarget, Target
from kvtune.tune.allocation import SIDES
from kvtune.tune.evaluation import CRASHES, is_likely, plain, started
from kvtune.tune.pace import Pace
from kvtune.tune.settings import TuneSettings
from kvtune.tune.space import with_layers

__all__ = ["SQUEEZE_SHARE", "PlaneProof", "SqueezeProof", "as_json", "planes_of"]

SQUEEZE_SHARE = 0.15
"""Of the budget, what is kept for this where it is asked for."""
MAX_ITEMS = 24
"""Requests replayed per side: only the order of the sides hangs on them."""
MAX_SETS = 3
"""Sets the gate judges, each two thirds of the one before."""

Side = tuple[int, str]
Planes = dict[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SqueezeProof:
    """`planes`: layer -> planes that reads of (keys, values) need, empty where nothing was proven; `quality`:
    the verdict on reading exactly them. `sides`: every nested side with what it loses alone, mildest first.
    `skipped`: why there is no verdict, empty otherwise. Bytes are per token at the reference context."""

    planes: Planes
    quality: QualityVerdict | None = None
    sides: tuple[tuple[Side, float], ...] = ()
    tried: tuple[tuple[Planes, QualityVerdict], ...] = ()
    skipped: str = ""
    bytes_per_token: float = 0.0
    lowered_bytes_per_token: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "planes": as_json(self.planes), "skipped": self.skipped,
            "num_sides": len(self.sides), "num_proven": len(sides_of(self.planes)),
            "bytes_per_token": self.bytes_per_token,
            "lowered_bytes_per_token": self.lowered_bytes_per_token,
            "quality": None if self.quality is None else self.quality.to_dict(),
            "sides": [{"layer": n, "side": side, "kl": kl} for (n, side), kl in self.sides],
            "tried": [{"planes": as_json(planes), "verdict": quality.verdict.value, "reason": quality.reason}
                      for planes, quality in self.tried],
        }  # fmt: skip


class PlaneProof:
    """One proof for one confirmed configuration. `search`: the reference of the half that may be looked at
    freely; `gate`: of the half that decides."""

    def __init__(
        self, target: Target, settings: TuneSettings, *, search: Reference, gate: Gate, pace: Pace,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._target, self._settings = target, settings
        self._search, self._gate = search, gate
        self._pace, self._rng = pace, rng

    def prove(self, config: Config) -> SqueezeProof:
        """The largest set found whose reading passes. A crash leaves nothing proven, and says so."""
        sides = nested_sides(self._target, config)
        if not sides:
            return SqueezeProof(planes={}, skipped="no side of the winner is stored in two planes (n8_rh)")
        try:
            with started(self._target, config, self._settings, self._pace) as running:
                if not isinstance(running, ReadsPlanes):
                    return SqueezeProof(planes={}, skipped="the engine cannot read one plane of two")
                return self._prove(running, running, sides, config)
        except CRASHES as error:
            return SqueezeProof(planes={}, skipped=" ".join(f"crashed: {error}".split()))

    def _prove(
        self, running: RunningTarget, planes: ReadsPlanes, sides: Sequence[Side], config: Config
    ) -> SqueezeProof:
        harms = self._harms(running, planes, sides)
        if harms is None:
            return SqueezeProof(planes={}, skipped="no time was left to measure what each side loses")
        ordered = sorted(harms, key=lambda side: harms[side])
        listed = tuple((side, harms[side]) for side in ordered)
        tried: list[tuple[Planes, QualityVerdict]] = []
        error, count = SharedError(MAX_SETS), self._largest(running, planes, ordered)
        while count and len(tried) < MAX_SETS and self._affords(len(self._gate.reference.items)):
            chosen = planes_of(ordered[:count])
            with planes.reading(chosen), self._pace.measure("squeeze"):
                quality, _ = judge_candidate(
                    running, self._gate, is_lossy=True, rng=self._rng, error=error.level(len(tried))
                )
            tried.append((chosen, quality))
            if quality.verdict is Verdict.PASS:
                sizes = (self._bytes(config), self._bytes(self._lowered(config, ordered[:count])))
                return SqueezeProof(
                    planes=chosen, quality=quality, sides=listed, tried=tuple(tried),
                    bytes_per_token=sizes[0], lowered_bytes_per_token=sizes[1],
                )  # fmt: skip
            count = 2 * count // 3
        why = "no time was left to prove it" if count else "no side passed on the search half"
        return SqueezeProof(planes={}, sides=listed, tried=tuple(tried), skipped="" if tried else why)

    def _harms(
        self, running: RunningTarget, planes: ReadsPlanes, sides: Sequence[Side]
    ) -> dict[Side, float] | None:
        """KL [nats per token] that reading each side at 4 bits adds, alone."""
        reference = self._search.head(MAX_ITEMS)
        if not self._affords(len(reference.items) * (1 + len(sides)) + 2 * len(self._search.items)):
            return None
        before = replay(running, reference)
        found: dict[Side, float] = {}
        for side in sides:
            with planes.reading(planes_of([side])):
                after = replay(running, reference)
            found[side] = isolated_kl(reference, before, after, rng=self._rng).value
        return found

    def _largest(self, running: RunningTarget, planes: ReadsPlanes, ordered: Sequence[Side]) -> int:
        """How many of the mildest sides likely pass together, by the search half: bisected, as more planes
        gone harm more."""
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high + 1) // 2
            with planes.reading(planes_of(ordered[:middle])):
                scores = replay(running, self._search)
            verdict = judge(self._search, scores, margin=self._settings.limits, is_lossy=True, rng=self._rng)
            low, high = (middle, high) if is_likely(plain(verdict.to_dict())) else (low, middle - 1)
        return low

    def _affords(self, num_requests: int) -> bool:
        return self._pace.left_s > self._pace.cost_s("replay", num_requests)

    def _bytes(self, config: Config) -> float:
        return self._target.kv_bytes_per_token(config, context=self._settings.context)

    def _lowered(self, config: Config, sides: Sequence[Side]) -> Config:
        """The configuration that stores no more than what is read of these sides at 4 bits."""
        if not isinstance(self._target, AllocatesLayers):
            return config
        offered = self._target.layer_codecs()
        table = codecs_of(config, offered.layers)
        for layer, side in sides:
            k, v = table[layer]
            table[layer] = (offered.high, v) if side == "k" else (k, offered.high)
        return with_layers(config, table)


def codecs_of(config: Config, layers: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Layer -> (k, v) codecs of a configuration."""
    table: Mapping[str, Sequence[str]] = config.get("layer_codecs", {})
    common = (config["k_codec"], config["v_codec"])
    pairs = {layer: table.get(str(layer), common) for layer in layers}
    return {layer: (str(k), str(v)) for layer, (k, v) in pairs.items()}


def nested_sides(target: Target, config: Config) -> list[Side]:
    """The (layer, side) that a configuration stores in two planes."""
    if not isinstance(target, AllocatesLayers) or not target.layer_codecs().stored:
        return []
    offered = target.layer_codecs()
    return [
        (layer, side)
        for layer, pair in codecs_of(config, offered.layers).items()
        for side, codec in zip(SIDES, pair, strict=True)
        if codec == offered.stored
    ]


def planes_of(sides: Sequence[Side]) -> Planes:
    """Layer -> planes of (keys, values), where these sides are read at 4 bits."""
    return {
        layer: (1 if (layer, "k") in sides else 2, 1 if (layer, "v") in sides else 2)
        for layer in sorted({layer for layer, _ in sides})
    }


def sides_of(planes: Mapping[int, tuple[int, int]]) -> list[Side]:
    """The sides that read one plane."""
    return [
        (layer, side)
        for layer, counts in planes.items()
        for side, n in zip(SIDES, counts, strict=True)
        if n == 1
    ]


def as_json(planes: Mapping[int, tuple[int, int]]) -> dict[str, list[int]]:
    """As a recipe holds it."""
    return {str(layer): list(counts) for layer, counts in sorted(planes.items())}
