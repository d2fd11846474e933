"""Several steps decided at once, where nothing but decoding can happen.

Between two arrivals most steps are alike: every running request gets one token, now and then a block. A
simulator that knows how long each request will be may perform such a run as one: the same verbs of the same
manager are called in the same order, only the steps between them are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.cache import KVCacheManager
from kvtune.errors import InvariantError
from kvtune.sched.sequence import Sequence as Live
from kvtune.types import TokenArray

__all__ = ["DecodeRun", "decode_run", "perform"]

_MAX_STEPS: Final = 4096
_ALLOCATE, _COMMIT = 0, 1


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The next `num_steps` steps if nobody arrives: each of `sequences` decodes one token in each, in this
    order, nobody is admitted or preempted, and nobody ends before the last step."""

    sequences: tuple[Live, ...]
    num_steps: int

    def contexts(self) -> npt.NDArray[np.int64]:
        """Keys each sequence sees in the first step."""
        return np.array([s.num_tokens for s in self.sequences], dtype=np.int64)


def decode_run(
    running: Sequence[Live], manager: KVCacheManager, *, reserve: float, max_model_len: int
) -> DecodeRun | None:
    """The run ahead of sequences that all decode and stop by length alone; None where it is shorter than two
    steps, or where blocks might run out (then each step has to be decided)."""
    num_steps = _MAX_STEPS
    for sequence in running:
        left = min(
            sequence.sampling.max_tokens - sequence.num_output_tokens, max_model_len - sequence.num_tokens
        )
        num_steps = min(num_steps, left)
        if manager.may_share_last(sequence.request_id):
            return None  # the first step may have to copy a block
    if num_steps < 2:
        return None
    # each sequence takes a block every block_size steps, and one more if a boundary comes first
    num_blocks = len(running) * (num_steps // manager.block_size + 1)
    room = min(usage.body.available - int(reserve * usage.body.total) for usage in manager.usage())
    if num_blocks > room:
        num_steps = (room // len(running) - 1) * manager.block_size
    return DecodeRun(tuple(running), num_steps) if num_steps >= 2 else None


def perform(
    run: DecodeRun,
    manager: KVCacheManager,
    *,
    tokens: Sequence[TokenArray],
    end_s: Sequence[float],
    reserves: Sequence[float],
) -> None:
    """Make `len(end_s)` steps of the run: tokens[i] int32 [steps] are what sequence i samples, `end_s` when
    each step ends, `reserves` the share of blocks each sequence must leave."""
    num_steps = len(end_s)
    starts = [s.num_computed_tokens for s in run.sequences]
    for sequence, own in zip(run.sequences, tokens, strict=True):
        sequence.extend(own, end_s)
    for _, phase, i, num_tokens in sorted(_changes(starts, num_steps, manager)):
        sequence = run.sequences[i]
        if phase == _ALLOCATE:
            if manager.allocate(sequence.request_id, num_tokens, reserve=reserves[i]) is None:
                raise InvariantError(f"a run of steps has no room for request {sequence.request_id!r}")
        else:
            manager.commit(sequence.request_id, sequence.token_ids, num_tokens)
    for sequence, start in zip(run.sequences, starts, strict=True):
        manager.commit(sequence.request_id, sequence.token_ids, start + num_steps)
        sequence.computed(num_steps)


def _changes(
    starts: Iterable[int], num_steps: int, manager: KVCacheManager
) -> Iterable[tuple[int, int, int, int]]:
    """(step, phase, sequence, tokens) of each call that changes something in the manager."""
    for i, start in enumerate(starts):
        for length in manager.growth_points(start, start + num_steps):
            yield length - start - 1, _ALLOCATE, i, length
        for length in manager.commit_points(start, start + num_steps):
            yield length - start - 1, _COMMIT, i, length
