"""What each layer and side loses at fewer bits, measured alone: one replay of some requests per question.

    all layers of a side at each smaller codec  ->  codecs that another beats in bytes and in KL fall out
    one unit of layers, one side, one codec     ->  isolated KL

The rest stays at the anchor, the uniform configuration that is to be beaten. Where the engine stores a nested
code, what the high plane alone loses is read from one running engine without encoding anything again.
Units are single layers; where time is short, neighbours share one (layers that lie close behave alike).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtune.quality import Estimate, Reference, isolated_kl, replay
from kvtune.target import Config, LayerCodecs, ReadsPlanes, RunningTarget, Scores, Target
from kvtune.tune.allocation import SIDES
from kvtune.tune.evaluation import CRASHES, started
from kvtune.tune.pace import Pace
from kvtune.tune.settings import TuneSettings

__all__ = ["Sensitivities", "Sensitivity", "SideMeter", "units_of"]

MAX_ITEMS = 48
"""Requests replayed per question: which side hurts more shows on few, whether it hurts is for the gate."""
PLANE_TIE = 1.1
"""A high plane is preferred to codecs of its size unless they lose so much less: it needs no new start."""

COST = "layer pass"

Question = tuple[tuple[int, ...], str, str]
"""(layers, side, codec)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """`kl`: nats per token that these layers' `side` adds to the anchor's when stored as `codec`."""

    layers: tuple[int, ...]
    side: str
    codec: str
    kl: Estimate
    method: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers), "side": self.side, "codec": self.codec, "kl": self.kl.to_dict(),
            "method": self.method,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivities:
    """`wide`: of all layers at once; `isolated`: by unit, in the order of `units`. `codecs`: per side, those
    worth giving to a layer, the anchor's first."""

    units: tuple[tuple[int, ...], ...]
    codecs: Mapping[str, tuple[str, ...]]
    wide: tuple[Sensitivity, ...]
    isolated: tuple[Sensitivity, ...]
    num_requests: int

    def harms(self, unit: tuple[int, ...], side: str) -> dict[str, float]:
        """By codec, the anchor's included: never below zero, for a smaller codec that did good is noise."""
        found = {s.codec: max(0.0, s.kl.value) for s in self.isolated if s.layers == unit and s.side == side}
        return {self.codecs[side][0]: 0.0} | found


def units_of(layers: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """`count` groups of neighbouring layers, as equal in size as can be."""
    parts = np.array_split(np.array(layers), max(1, min(count, len(layers))))
    return tuple(tuple(int(layer) for layer in part) for part in parts)


class SideMeter:
    """Asks the questions of one anchor. `left_s`: seconds that may still be spent on them."""

    def __init__(
        self, target: Target, offered: LayerCodecs, anchor: Config, reference: Reference, *,
        settings: TuneSettings, pace: Pace, rng: np.random.Generator, left_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._target, self._offered, self._anchor = target, offered, dict(anchor)
        self._reference = reference.head(MAX_ITEMS)
        self._settings, self._pace, self._rng, self._left_s = settings, pace, rng, left_s
        self._before: tuple[Scores, ...] | None = None
        self._nested: tuple[Scores, ...] | None = None

    def measure(self) -> Sensitivities | str:
        """All of it, or why not: no smaller codec, or no time."""
        smaller = {side: self._smaller(side) for side in SIDES}
        if not any(smaller.values()):
            return "no codec is smaller than the anchor's"
        if not self._affords(2 + sum(map(len, smaller.values()))):
            return "no time is left to measure layers"
        wide = self._asked([(self._offered.layers, side, c) for side in SIDES for c in smaller[side]])
        codecs = {side: (self._anchor[f"{side}_codec"], *self._kept(wide, side)) for side in SIDES}
        per_unit = sum(len(names) - 1 for names in codecs.values())
        if not per_unit:
            return "no smaller codec runs"
        count = min(len(self._offered.layers), self._affordable() // per_unit)
        if count < min(2, len(self._offered.layers)):
            return "no time is left to measure layers apart"
        units = units_of(self._offered.layers, count)
        isolated = self._asked([(u, side, c) for u in units for side in SIDES for c in codecs[side][1:]])
        return Sensitivities(
            units=units, codecs=codecs, wide=wide, isolated=isolated, num_requests=len(self._reference.items)
        )

    # -- which codecs

    def _size(self, side: str, codec: str) -> float:
        config = {**self._anchor, f"{side}_codec": codec}
        return self._target.kv_bytes_per_token(config, context=self._settings.context)

    def _smaller(self, side: str) -> tuple[str, ...]:
        now = self._size(side, self._anchor[f"{side}_codec"])
        return tuple(codec for codec in self._offered.codecs if self._size(side, codec) < now)

    def _kept(self, wide: Sequence[Sensitivity], side: str) -> list[str]:
        """Codecs of one side that no other beats: at most its bytes and less KL."""
        own = {s.codec: s.kl.value for s in wide if s.side == side}
        if self._offered.high in own:
            own[self._offered.high] /= PLANE_TIE
        size = {codec: self._size(side, codec) for codec in own}

        def is_beaten(codec: str) -> bool:
            rank = (own[codec], codec)
            return any(size[other] <= size[codec] and (own[other], other) < rank for other in own)

        return [codec for codec in own if not is_beaten(codec)]

    # -- questions

    def _asked(self, questions: Sequence[Question]) -> tuple[Sensitivity, ...]:
        """Answers in the order of the questions; what the engine does not run has none, and is then no choice
        for that side. Planes first, and their engine closed, so that there is one KV cache at a time."""
        found: dict[Question, tuple[Estimate, str]] = {}
        high = [question for question in questions if question[2] == self._offered.high]
        if high:
            with self._planes() as read:
                for question in high:
                    with contextlib.suppress(*CRASHES):
                        if read is not None:
                            found[question] = (read(question[0], question[1]), "planes")
        for question in questions:
            if question not in found:
                with contextlib.suppress(*CRASHES):
                    found[question] = (self._by_replay(*question), "replay")
        return tuple(
            Sensitivity(layers=q[0], side=q[1], codec=q[2], kl=found[q][0], method=found[q][1])
            for q in questions
            if q in found
        )

    def _by_replay(self, layers: Sequence[int], side: str, codec: str) -> Estimate:
        if self._before is None:
            self._before = self._replayed(self._anchor)
        pair = {s: self._anchor[f"{s}_codec"] for s in SIDES} | {side: codec}
        table = {str(layer): [pair["k"], pair["v"]] for layer in layers}
        after = self._replayed({**self._anchor, "layer_codecs": table})
        return isolated_kl(self._reference, self._before, after, rng=self._rng)

    def _replayed(self, config: Config) -> tuple[Scores, ...]:
        with started(self._target, config, self._settings, self._pace) as running:
            return self._scored(running)

    @contextmanager
    def _planes(self) -> Generator[Callable[[Sequence[int], str], Estimate] | None]:
        """Asks what layers' side adds when its high plane alone is read, of one engine that stores every side
        nested; None where there is no such engine."""
        stored = {f"{side}_codec": self._offered.stored for side in SIDES}
        with contextlib.ExitStack() as stack:
            try:
                running = stack.enter_context(
                    started(self._target, {**self._anchor, **stored}, self._settings, self._pace)
                )
            except CRASHES:
                running = None
            if not isinstance(running, ReadsPlanes):
                yield None
                return
            if self._nested is None:
                self._nested = self._scored(running)
            yield functools.partial(self._by_planes, running, running, self._nested)

    def _by_planes(
        self, running: RunningTarget, planes: ReadsPlanes, before: Sequence[Scores], layers: Sequence[int],
        side: str,
    ) -> Estimate:  # fmt: skip
        with planes.reading(dict.fromkeys(layers, (1, 2) if side == "k" else (2, 1))):
            after = self._scored(running)
        return isolated_kl(self._reference, before, after, rng=self._rng)

    def _scored(self, running: RunningTarget) -> tuple[Scores, ...]:
        with self._pace.measure(COST):
            return replay(running, self._reference)

    # -- time

    def _pass_s(self) -> float:
        count = len(self._reference.items)
        replayed = self._pace.cost_s("replay", count) or self._pace.cost_s("reference", count) / 2
        return self._pace.cost_s("start") + (self._pace.cost_s(COST) or replayed)

    def _affordable(self) -> int:
        each = self._pass_s()
        return 10**6 if each <= 0 else max(0, int(self._left_s() / each))

    def _affords(self, passes: int) -> bool:
        return self._affordable() >= passes
