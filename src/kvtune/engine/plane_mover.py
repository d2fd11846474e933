"""Moves low planes between the device pool and the host arena, as the scheduler decided.

Knows rows and bytes, no reasons: what moves and why is in the `PlaneMove`s it performs in their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvtune.config import CacheConfig
from kvtune.kernels import LayerCache, LowPlanes
from kvtune.spec import KVGroup
from kvtune.tiers import Tier
from kvtune.types import BlockId, PlaneMove, PlaneVerb

__all__ = ["PlaneMover", "PlaneTraffic"]


@dataclass(slots=True)
class PlaneTraffic:
    """Bytes moved so far, and what the host arena holds now."""

    bytes_dropped: int = 0
    bytes_restored: int = 0
    resting_bytes: int = 0
    arena_bytes: int = 0


class PlaneMover:
    """The hands of `cache.Precision`. A block's planes of all layers of its group travel as one payload."""

    def __init__(
        self, groups: Sequence[KVGroup], caches: Mapping[int, LayerCache], cache: CacheConfig, tier: Tier
    ) -> None:
        self._tier = tier
        self._sides = [
            [
                caches[layer].low_planes[side]
                for layer in group.layers
                for side in cache.droppable_sides(layer)
            ]
            for group in groups
        ]
        self._bytes_dropped = self._bytes_restored = 0

    def perform(self, moves: Sequence[PlaneMove]) -> list[PlaneMove]:
        """Make the moves; returns those the host arena failed at, whose planes are gone."""
        verbs: dict[PlaneVerb, Callable[[int, Sequence[PlaneMove]], list[PlaneMove]]] = {
            PlaneVerb.DROP: self._drop,
            PlaneVerb.RESTORE: self._restore,
            PlaneVerb.DISCARD: self._discard,
        }
        failed: list[PlaneMove] = []
        for (verb, group), same in itertools.groupby(moves, key=lambda move: (move.verb, move.group)):
            failed += verbs[verb](group, list(same))
        return failed

    def close(self) -> None:
        """Let the planes and the arena go."""
        self._tier.clear()
        self._sides.clear()

    def traffic(self) -> PlaneTraffic:
        return PlaneTraffic(
            bytes_dropped=self._bytes_dropped, bytes_restored=self._bytes_restored,
            resting_bytes=self._tier.used_bytes, arena_bytes=self._tier.capacity_bytes,
        )  # fmt: skip

    def _drop(self, group: int, moves: Sequence[PlaneMove]) -> list[PlaneMove]:
        rows = torch.tensor([move.row for move in moves])
        payloads = torch.cat([low.read_rows(rows) for low in self._sides[group]], dim=1).numpy()
        failed: list[PlaneMove] = []
        for move, payload in zip(moves, payloads, strict=True):
            if self._tier.put(_key(group, move.block), payload):
                self._bytes_dropped += payload.size
            else:
                failed.append(move)
        return failed

    def _restore(self, group: int, moves: Sequence[PlaneMove]) -> list[PlaneMove]:
        found: list[torch.Tensor] = []
        rows: list[int] = []
        failed: list[PlaneMove] = []
        size = sum(low.plane_bytes for low in self._sides[group])
        for move in moves:
            payload = self._tier.get(_key(group, move.block))
            if payload is None or payload.size != size:
                failed.append(move)
                continue
            self._tier.discard(_key(group, move.block))
            found.append(torch.from_numpy(payload))
            rows.append(move.row)
        if found:
            planes = torch.stack(found)
            self._bytes_restored += planes.numel()
            self._write(self._sides[group], torch.tensor(rows), planes)
        return failed

    @staticmethod
    def _write(sides: Sequence[LowPlanes], rows: torch.Tensor, planes: torch.Tensor) -> None:
        parts = planes.split([low.plane_bytes for low in sides], dim=1)
        for low, part in zip(sides, parts, strict=True):
            low.write_rows(rows, part)

    def _discard(self, group: int, moves: Sequence[PlaneMove]) -> list[PlaneMove]:
        for move in moves:
            self._tier.discard(_key(group, move.block))
        return []


def _key(group: int, block: BlockId) -> bytes:
    return group.to_bytes(2, "little") + block.to_bytes(8, "little")
