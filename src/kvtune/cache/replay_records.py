"""What a replay takes and answers; shared by the native core and its pure-Python twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.workload import BlockTrace

__all__ = ["EngineLimits", "Outcome", "ReplayJob", "TraceArrays", "checked_arrays", "engine_limits"]

Number = TypeVar("Number", bound=np.generic)
IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TraceArrays:
    """The arrays of a BlockTrace as the cores read them: of the right type, contiguous, of one size.

    `block_ids` int64 [N], `request_start` int64 [R + 1], `block_tokens` int32 [N].
    """

    block_ids: IntArray
    request_start: IntArray
    block_tokens: Int32Array
    num_unique: int

    @property
    def num_requests(self) -> int:
        return len(self.request_start) - 1

    @property
    def num_references(self) -> int:
        return len(self.block_ids)


def checked_arrays(trace: BlockTrace) -> TraceArrays:
    """UsageError where the arrays do not belong together. What the ids say is checked by the cores."""
    arrays = TraceArrays(
        block_ids=_contiguous("block_ids", trace.block_ids, np.int64),
        request_start=_contiguous("request_start", trace.request_start, np.int64),
        block_tokens=_contiguous("block_tokens", trace.block_tokens, np.int32),
        num_unique=trace.num_unique,
    )
    if arrays.num_requests < 0 or len(arrays.block_tokens) != arrays.num_references:
        raise UsageError(
            f"a block trace of {arrays.num_references} block ids needs as many block_tokens, found "
            f"{len(arrays.block_tokens)}, and request_start with one more entry than requests"
        )
    prompts = _contiguous("prompt_tokens", trace.prompt_tokens, np.int64)
    tenants = _contiguous("tenant", trace.tenant, np.int32)
    if not len(prompts) == len(tenants) == arrays.num_requests:
        raise UsageError(
            f"a block trace of {arrays.num_requests} requests needs as many prompt_tokens and tenants, found "
            f"{len(prompts)} and {len(tenants)}"
        )
    if len(tenants) and not 0 <= int(tenants.min()) <= int(tenants.max()) < len(trace.tenants):
        raise UsageError(f"a block trace names tenants outside its list of {len(trace.tenants)}")
    return arrays


def _contiguous(name: str, values: npt.NDArray[Number], dtype: type[Number]) -> npt.NDArray[Number]:
    if values.ndim != 1 or values.dtype != np.dtype(dtype):
        raise UsageError(
            f"a block trace's {name} must be one row of {np.dtype(dtype).name}, found "
            f"{values.ndim} dimensions of {values.dtype}"
        )
    return np.ascontiguousarray(values)


@dataclass(frozen=True, slots=True, eq=False)
class EngineLimits:
    """How an engine limits each request, int32 [R] each.

    `num_blocks`: full blocks of the prompt, which alone are cached. `num_slots`: blocks it occupies while
    it runs, its partial last block and tokens of unknown content included. `max_hit`: leading blocks that
    leave a token to compute, since its logits are needed.
    """

    num_blocks: Int32Array
    num_slots: Int32Array
    max_hit: Int32Array


def engine_limits(trace: BlockTrace) -> EngineLimits:
    """What `KVCacheManager` would do with each prompt. UsageError where blocks differ in size."""
    ends = trace.request_start[1:]
    is_last = np.zeros(trace.num_references, dtype=bool)
    is_last[ends[np.diff(trace.request_start) > 0] - 1] = True
    if (trace.block_tokens[~is_last] != trace.block_size).any():
        raise UsageError(
            "an engine's blocks are of one size, this trace's are content chunks of many: give --block-size"
        )
    full = np.concatenate([[0], np.cumsum(trace.block_tokens == trace.block_size)])
    return EngineLimits(
        num_blocks=np.diff(full[trace.request_start]).astype(np.int32),
        num_slots=(-(-trace.prompt_tokens // trace.block_size)).astype(np.int32),
        max_hit=(np.maximum(trace.prompt_tokens - 1, 0) // trace.block_size).astype(np.int32),
    )


@dataclass(frozen=True, slots=True)
class ReplayJob:
    """One replay: a policy and its parameters at a capacity in blocks; `limits` None for a plain trace
    replay. `keep_log` records which blocks left, in order."""

    policy: str
    capacity: int
    limits: EngineLimits | None = None
    parameters: Mapping[str, float] = field(default_factory=dict[str, float])
    keep_log: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Per request, [R]: leading blocks hit, the tokens they hold, blocks that left while it was served,
    and whether it was refused because it needs more blocks than there are."""

    hit_blocks: Int32Array
    hit_tokens: IntArray
    num_evicted: Int32Array
    is_rejected: npt.NDArray[np.uint8]

    @staticmethod
    def empty(num_requests: int) -> Outcome:
        return Outcome(
            hit_blocks=np.zeros(num_requests, dtype=np.int32),
            hit_tokens=np.zeros(num_requests, dtype=np.int64),
            num_evicted=np.zeros(num_requests, dtype=np.int32),
            is_rejected=np.zeros(num_requests, dtype=np.uint8),
        )
