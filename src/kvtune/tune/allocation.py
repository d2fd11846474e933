"""Which codec each layer and side gets: the least harm that fits a byte budget. Plain numbers, no engine.

A multiple-choice knapsack (Sinha and Zoltners 1979) over units of layers: each takes one pair of codecs,
bytes and harms add up. That bytes add up is exact, they are the allocator's; that harms do is an
approximation (Model-Optimizer's AutoQuantize reports accuracy that is not monotonic over budgets), so a table
found here is a proposal: the gate replays it whole, and `raised` repairs what it finds too harmful.

Solved for all budgets at once: merging units one by one, only partial sums that no other beats in both bytes
and harm are kept (dynamic programming by dominance, Nemhauser and Ullmann 1969).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.errors import InvariantError

__all__ = ["SIDES", "Allocation", "Option", "Unit", "frontier", "options_of", "raised", "within"]

SIDES = ("k", "v")
MAX_STATES = 20_000
"""Partial sums kept. Beyond, those closest in bytes are thinned out and the optimum is missed by little:
no budget is served worse than the best kept sum below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One pair of codecs for one unit. `num_bytes`: what the unit's layers then take at the reference
    context, less what they take at the anchor; `harms`: mean KL [nats per token] that (keys, values) add."""

    codecs: tuple[str, str]
    num_bytes: int
    harms: tuple[float, float]

    @property
    def harm(self) -> float:
        return self.harms[0] + self.harms[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that get the same codecs."""

    layers: tuple[int, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One option per unit, by index; bytes and predicted harm in all."""

    choice: tuple[int, ...]
    num_bytes: int
    harm: float

    def table(self, units: Sequence[Unit]) -> dict[int, tuple[str, str]]:
        """Layer -> (k_codec, v_codec)."""
        return {
            layer: unit.options[index].codecs
            for unit, index in zip(units, self.choice, strict=True)
            for layer in unit.layers
        }


def frontier(units: Sequence[Unit], *, max_states: int = MAX_STATES) -> list[Allocation]:
    """Every allocation that no other beats in both bytes and harm, most bytes first.

    The best for a budget is the first of it that fits (`within`). InvariantError without options.
    """
    if not units or not all(unit.options for unit in units):
        raise InvariantError("an allocation needs units, and options in each")
    sizes, harms = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for unit in units:
        own_bytes = np.array([o.num_bytes for o in unit.options], np.int64)
        own_harms = np.array([o.harm for o in unit.options])
        all_bytes = (sizes[:, None] + own_bytes).ravel()
        all_harms = (harms[:, None] + own_harms).ravel()
        kept = _thinned(_undominated(all_bytes, all_harms), all_bytes, max_states)
        steps.append((kept // len(own_bytes), kept % len(own_bytes)))
        sizes, harms = all_bytes[kept], all_harms[kept]
    found: list[Allocation] = []
    for last in range(len(sizes)):
        at, choice = last, [0] * len(units)
        for index in range(len(units) - 1, -1, -1):
            before, option = steps[index]
            choice[index] = int(option[at])
            at = int(before[at])
        found.append(Allocation(choice=tuple(choice), num_bytes=int(sizes[last]), harm=float(harms[last])))
    return found[::-1]


def _undominated(sizes: npt.NDArray[np.int64], harms: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Indices of sums that no other has at most the bytes and less harm of; fewest bytes first."""
    order = np.lexsort((harms, sizes))
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], harms[order][:-1])))
    return order[harms[order] < best_before]


def _thinned(kept: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` of them, spread evenly over bytes; both ends stay."""
    if len(kept) <= limit:
        return kept
    at = sizes[kept]
    wanted = np.linspace(at[0], at[-1], limit)
    return kept[np.unique(np.searchsorted(at, wanted, side="right") - 1)]


def within(front: Sequence[Allocation], budget: int) -> Allocation | None:
    """The least harm that takes at most `budget` bytes; None where nothing is that small."""
    return next((allocation for allocation in front if allocation.num_bytes <= budget), None)


def raised(units: Sequence[Unit], allocation: Allocation) -> Allocation | None:
    """The allocation with its most harmful side one step larger; None where no side can be harmed less.

    One step: the smallest codec of that unit and side that does less harm, the other side as it is.
    """
    sides = sorted(
        itertools.product(range(len(units)), range(len(SIDES))),
        key=lambda at: -units[at[0]].options[allocation.choice[at[0]]].harms[at[1]],
    )
    for index, side in sides:
        options, now = units[index].options, allocation.choice[index]
        better = _next_larger(options, now, side)
        if better is not None:
            choice = (*allocation.choice[:index], better, *allocation.choice[index + 1 :])
            return allocation_of(units, choice)
    return None


def _next_larger(options: Sequence[Option], now: int, side: int) -> int | None:
    current = options[now]
    larger = [
        (option.num_bytes, option.harms[side], at)
        for at, option in enumerate(options)
        if option.codecs[1 - side] == current.codecs[1 - side]
        and option.num_bytes >= current.num_bytes
        and option.harms[side] < current.harms[side]
    ]
    return min(larger)[2] if larger else None


def allocation_of(units: Sequence[Unit], choice: Sequence[int]) -> Allocation:
    """Bytes and harm of a choice of options."""
    chosen = [unit.options[index] for unit, index in zip(units, choice, strict=True)]
    return Allocation(
        choice=tuple(choice), num_bytes=sum(o.num_bytes for o in chosen), harm=sum(o.harm for o in chosen)
    )


def options_of(
    harms: Sequence[Mapping[str, float]], num_bytes: Mapping[tuple[str, str], int]
) -> tuple[Option, ...]:
    """All pairs of codecs of one unit. `harms`: by codec, of keys and of values; `num_bytes`: by pair."""
    return tuple(
        Option(codecs=(k, v), num_bytes=num_bytes[k, v], harms=(harms[0][k], harms[1][v]))
        for k, v in itertools.product(harms[0], harms[1])
    )
