"""Which low planes of the winner may go while memory is short: what a recipe calls `squeeze_planes`.

Chosen on the requests of the search, each side read alone at 4 bits and then the mildest together; proven on
those it never saw, by the whole gate with all of these planes gone at once: a squeeze can only do less.
The claim is one of its own beside the winner's, so it has its own chance of a false PASS, shared by the sets
that are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

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

__all__ = ["SQUEEZE_SHARE", "PlaneProof", "SqueezeProof", "as_json", "planes_of", "prove_planes"]

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


class ReadsNested(RunningTarget, ReadsPlanes, Protocol):
    """A started engine whose nested codes can be read from one plane."""


class PlaneProof:
    """One proof for one started engine. `search`: the reference that may be looked at freely; `gate`: of the
    requests that decide. `affords`: whether there is time to replay so many requests."""

    def __init__(
        self, running: ReadsNested, *, search: Reference, gate: Gate, rng: np.random.Generator,
        affords: Callable[[int], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        self._running, self._search, self._gate = running, search, gate
        self._rng, self._affords = rng, affords

    def prove(self, sides: Sequence[Side]) -> SqueezeProof:
        """The largest set found among `sides`, which are stored in two planes, whose reading passes."""
        harms = self._harms(sides)
        if harms is None:
            return SqueezeProof(planes={}, skipped="no time was left to measure what each side loses")
        ordered = sorted(harms, key=lambda side: harms[side])
        listed = tuple((side, harms[side]) for side in ordered)
        tried: list[tuple[Planes, QualityVerdict]] = []
        error, count = SharedError(MAX_SETS), self._largest(ordered)
        while count and len(tried) < MAX_SETS and self._affords(len(self._gate.reference.items)):
            chosen = planes_of(ordered[:count])
            with self._running.reading(chosen):
                quality, _ = judge_candidate(
                    self._running, self._gate, is_lossy=True, rng=self._rng, error=error.level(len(tried))
                )
            tried.append((chosen, quality))
            if quality.verdict is Verdict.PASS:
                return SqueezeProof(planes=chosen, quality=quality, sides=listed, tried=tuple(tried))
            count = 2 * count // 3
        why = "no time was left to prove it" if count else "no side passed on the search half"
        return SqueezeProof(planes={}, sides=listed, tried=tuple(tried), skipped="" if tried else why)

    def _harms(self, sides: Sequence[Side]) -> dict[Side, float] | None:
        """KL [nats per token] that reading each side at 4 bits adds, alone."""
        reference = self._search.head(MAX_ITEMS)
        if not self._affords(len(reference.items) * (1 + len(sides)) + 2 * len(self._search.items)):
            return None
        before = replay(self._running, reference)
        found: dict[Side, float] = {}
        for side in sides:
            with self._running.reading(planes_of([side])):
                after = replay(self._running, reference)
            found[side] = isolated_kl(reference, before, after, rng=self._rng).value
        return found

    def _largest(self, ordered: Sequence[Side]) -> int:
        """How many of the mildest sides likely pass together, by the search half: bisected, as more planes
        gone harm more."""
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high + 1) // 2
            with self._running.reading(planes_of(ordered[:middle])):
                scores = replay(self._running, self._search)
            verdict = judge(self._search, scores, margin=self._gate.margin, is_lossy=True, rng=self._rng)
            low, high = (middle, high) if is_likely(plain(verdict.to_dict())) else (low, middle - 1)
        return low


def prove_planes(
    target: Target, config: Config, settings: TuneSettings, *, search: Reference, gate: Gate, pace: Pace,
    rng: np.random.Generator,
) -> SqueezeProof:  # fmt: skip
    """The proof for one confirmed configuration, started for it, in the time that `pace` has left. A crash
    leaves nothing proven, and says so."""
    sides = nested_sides(target, config)
    if not sides:
        return SqueezeProof(planes={}, skipped="no side of the winner is stored in two planes (n8_rh)")
    try:
        with started(target, config, settings, pace) as running:
            if not isinstance(running, ReadsPlanes):
                return SqueezeProof(planes={}, skipped="the engine cannot read one plane of two")
            proof = PlaneProof(
                running, search=search, gate=gate, rng=rng,
                affords=lambda count: pace.left_s > pace.cost_s("replay", count),
            ).prove(sides)  # fmt: skip
    except CRASHES as error:
        return SqueezeProof(planes={}, skipped=" ".join(f"crashed: {error}".split()))
    if not proof.planes:
        return proof
    lowered = _lowered(target, config, sides_of(proof.planes))
    whole, least = (target.kv_bytes_per_token(c, context=settings.context) for c in (config, lowered))
    return replace(proof, bytes_per_token=whole, lowered_bytes_per_token=least)


def _lowered(target: Target, config: Config, sides: Sequence[Side]) -> Config:
    """The configuration that stores no more than what is read of these sides at 4 bits."""
    if not isinstance(target, AllocatesLayers):
        return config
    offered = target.layer_codecs()
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
