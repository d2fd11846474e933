"""How much a step computes and reads, in a few numbers: what its time is a function of.

Tensor-free, so that the engine's calibration and the simulator's cost model describe steps alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from kvtune.config import CacheConfig
from kvtune.sched.shared_reads import LEAST_SHARED, SharedReads
from kvtune.spec import KVGroup, group_block_bytes
from kvtune.types import BlockTable, SchedulerOutput

__all__ = ["CALIBRATION_VERSION", "SHAPE_COLUMNS", "Overlap", "ReadGeometry", "ShapeRows", "StepShapes"]

SHAPE_COLUMNS = (
    "num_decodes", "num_prefills", "prefill_tokens", "num_samples", "decode_bytes", "prefill_bytes",
    "prefill_pairs", "distinct_bytes", "num_admitted", "admitted_tokens", "after_prefill",
)  # fmt: skip
"""Columns of `ShapeRows`. A decode is a chunk of one token, every longer chunk a prefill.

num_samples: sequences whose next token is sampled. decode_bytes, prefill_bytes: KV bytes of all layers
that decodes read (a prefix that native attention reads for several of them at once counts once), and that
prefill chunks read when each key is read once. prefill_pairs: query-key
pairs of prefill chunks, summed over layers. distinct_bytes: KV bytes read when a block that several
sequences of the step share is counted once: the others find it in the processor's cache. num_admitted,
admitted_tokens: requests that left the queue for this step, and their tokens, cached or not: looked up,
taken from the idle blocks, published. after_prefill: 1/n in the n-th step after the last one that held a
prefill, which pushed what decodes read out of the processor's caches; 0 where a step holds one itself.
"""

CALIBRATION_VERSION = 5
"""Format of files that hold measured steps as rows of these columns."""

ShapeRows = npt.NDArray[np.float64]
"""[num_steps, len(SHAPE_COLUMNS)]"""


@dataclass(frozen=True, slots=True)
class _GroupRead:
    window: int | None
    token_bytes: float  # over the group's layers
    num_layers: int
    block_bytes: float
    shared: tuple[tuple[SharedReads, int], ...]  # the rule of layers with the same codecs, and how many


@dataclass(frozen=True, slots=True)
class Overlap:
    """KV bytes that sequences of a step have in common: held again by a second, third ... sequence, and of
    those the ones that are not even read again."""

    repeated_bytes: float = 0.0
    saved_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadGeometry:
    """What attention reads per visible key in each KV group."""

    groups: tuple[_GroupRead, ...]
    block_size: int

    @classmethod
    def of(cls, groups: Sequence[KVGroup], cache: CacheConfig, *, num_heads: int | None) -> Self:
        """From the engine's KV groups and its codecs per layer. `num_heads`: the model's query heads, None
        where they are not known: then no reads are saved."""
        return cls(tuple(_group_read(group, cache, num_heads) for group in groups), cache.block_size)

    def row(self, step: SchedulerOutput, *, steps_before: float = math.inf) -> list[float]:
        """One row of `ShapeRows` for a step; `steps_before`: how many were made since the last prefill."""
        decodes = step.decodes
        return self.row_of(
            [(chunk.start, chunk.num_tokens, chunk.samples) for chunk in step.others],
            decode_starts=() if decodes is None else decodes.starts.tolist(),
            admitted=[a.num_cached_tokens + sum(a.misses.values()) for a in step.admitted],
            overlap=self._overlap_of(step),
            steps_before=steps_before,
        )

    def _overlap_of(self, step: SchedulerOutput) -> Overlap:
        others = [chunk.block_tables for chunk in step.others]
        if step.decodes is None:
            return self.overlap((), (), others)
        decodes = step.decodes
        rows = zip(*decodes.block_tables, strict=True)
        return self.overlap([tuple(tables) for tables in rows], decodes.starts, others)

    def overlap(
        self,
        tables: Sequence[tuple[BlockTable, ...]],
        starts: Sequence[int] | npt.NDArray[np.int64],
        others: Sequence[tuple[BlockTable, ...]] = (),
    ) -> Overlap:
        """What sequences have in common. `tables`, per sequence and group, of those that decode, each behind
        so many tokens; `others`: of those that compute more than one."""
        if len(tables) + len(others) < 2:
            return Overlap()
        repeated = saved = 0.0
        for g, group in enumerate(self.groups):
            own = [one[g] for one in tables]
            count = _num_repeated(np.concatenate([*own, *(one[g] for one in others)]))
            repeated += group.block_bytes * count
            if count * self.block_size >= LEAST_SHARED:
                common = [int(start) // self.block_size for start in starts]
                for rule, num_layers in group.shared:
                    token_bytes = num_layers * rule.block_bytes / self.block_size
                    saved += token_bytes * rule.saved_tokens(own, common)
        return Overlap(repeated, saved)

    def row_of(
        self,
        chunks: Sequence[tuple[int, int, bool]],
        *,
        decode_starts: Sequence[int] = (),
        admitted: Sequence[int] = (),
        overlap: Overlap = Overlap(),
        steps_before: float = math.inf,
    ) -> list[float]:
        """One row of `ShapeRows` for (tokens computed before, tokens in the chunk, samples), and for
        sequences that compute one token behind each of `decode_starts` and sample. `admitted`: tokens of
        each request that was admitted for it; `steps_before`: as in `row`."""
        prefills = [(start, n) for start, n, _ in chunks if n != 1]
        decode_keys = [start + 1 for start in decode_starts] + [start + 1 for start, n, _ in chunks if n == 1]
        decode_bytes = prefill_bytes = pairs = 0.0
        for group in self.groups:
            if decode_keys:
                decode_bytes += group.token_bytes * _visible(decode_keys, group.window)
            for start, n in prefills:
                keys = start + n
                if group.window is not None:
                    keys = min(keys, group.window - 1 + n)
                prefill_bytes += group.token_bytes * keys
                pairs += group.num_layers * _pairs(start, n, group.window)
        return [
            float(len(decode_keys)),
            float(len(prefills)),
            float(sum(n for _, n in prefills)),
            float(len(decode_starts) + sum(samples for *_, samples in chunks)),
            max(0.0, decode_bytes - overlap.saved_bytes),
            prefill_bytes,
            pairs,
            max(0.0, decode_bytes + prefill_bytes - overlap.repeated_bytes),
            float(len(admitted)),
            float(sum(admitted)),
            0.0 if prefills else 1.0 / (steps_before + 1.0),
        ]

    def decode_rows(
        self,
        contexts: npt.NDArray[np.int64],
        num_steps: int,
        *,
        overlap: Overlap = Overlap(),
        steps_before: float = math.inf,
    ) -> ShapeRows:
        """`ShapeRows` of steps that decode a token of each sequence; `contexts`: keys seen in the first,
        `steps_before` the first: as in `row`.

        What is shared at the start stays shared: decoding adds blocks of one's own (a window that moves past
        a shared block meanwhile is not followed).
        """
        rows = np.zeros((num_steps, len(SHAPE_COLUMNS)))
        rows[:, 0] = rows[:, 3] = len(contexts)
        num_bytes = self._decode_bytes(contexts, num_steps)
        rows[:, 4] = np.maximum(num_bytes - overlap.saved_bytes, 0.0)
        rows[:, 7] = np.maximum(num_bytes - overlap.repeated_bytes, 0.0)
        rows[:, 10] = 1.0 / (steps_before + 1.0 + np.arange(num_steps))
        return rows

    def _decode_bytes(self, contexts: npt.NDArray[np.int64], num_steps: int) -> npt.NDArray[np.float64]:
        """[num_steps] bytes read; each sequence sees `contexts` keys first and one more in each next step."""
        steps = np.arange(num_steps)
        total = np.zeros(num_steps)
        for group in self.groups:
            if group.window is None:
                total += group.token_bytes * (float(contexts.sum()) + len(contexts) * steps)
            else:
                # a sequence's count grows by one a step until it reaches the window
                room = np.sort(np.maximum(group.window - contexts, 0))
                seen = np.minimum(contexts, group.window).sum()
                before = np.concatenate(([0], np.cumsum(room)))
                full = np.searchsorted(room, steps, side="right")
                total += group.token_bytes * (seen + before[full] + (len(room) - full) * steps)
        return total


class StepShapes:
    """`ShapeRows` of steps in the order they are made, because a prefill is felt in the steps after it."""

    def __init__(self, geometry: ReadGeometry) -> None:
        self.geometry = geometry
        self._steps_before = math.inf

    def row(self, step: SchedulerOutput) -> list[float]:
        """Of the next step."""
        row = self.geometry.row(step, steps_before=self._steps_before)
        self._steps_before = 0.0 if row[1] else self._steps_before + 1.0
        return row

    def decode_rows(
        self, contexts: npt.NDArray[np.int64], num_steps: int, *, overlap: Overlap = Overlap()
    ) -> ShapeRows:
        """Of the next steps if they decode; `decoded` says how many did. See `ReadGeometry.decode_rows`."""
        return self.geometry.decode_rows(
            contexts, num_steps, overlap=overlap, steps_before=self._steps_before
        )

    def decoded(self, num_steps: int) -> None:
        """So many steps of those in `decode_rows` were made."""
        self._steps_before += num_steps


def _num_repeated(block_ids: npt.NDArray[np.int32]) -> int:
    """Entries that name a block another one names; -1 (the window has passed, or nothing) aside."""
    held = np.sort(block_ids)
    held = held[np.searchsorted(held, 0) :]
    return int(np.count_nonzero(held[1:] == held[:-1]))


def _group_read(group: KVGroup, cache: CacheConfig, num_heads: int | None) -> _GroupRead:
    block_bytes = group_block_bytes(group, cache.codecs_of, cache.block_size)
    shared: list[tuple[SharedReads, int]] = []
    if num_heads and group.window is None:
        by_codecs = Counter(cache.codecs_of(layer) for layer in group.layers)
        one = replace(group, layers=group.layers[:1])
        for (k, v), count in by_codecs.items():
            size = group_block_bytes(one, lambda _, pair=(k, v): pair, cache.block_size)
            per_kv_head = num_heads // group.num_kv_heads
            rule = SharedReads(
                k_codec=k, v_codec=v, block_size=cache.block_size, block_bytes=size, num_heads=per_kv_head
            )
            shared.append((rule, count))
    return _GroupRead(
        window=group.window, token_bytes=block_bytes / cache.block_size, num_layers=len(group.layers),
        block_bytes=block_bytes, shared=tuple(shared),
    )  # fmt: skip


def _visible(keys: Sequence[int], window: int | None) -> int:
    return sum(keys) if window is None else sum(min(k, window) for k in keys)


def _pairs(start: int, n: int, window: int | None) -> int:
    """Keys seen, summed over queries at positions start .. start + n - 1."""
    if window is None or start + n <= window:
        return n * start + n * (n + 1) // 2
    rising = max(0, window - start)  # queries that still see everything before them
    return rising * start + rising * (rising + 1) // 2 + (n - rising) * window
