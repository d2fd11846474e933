"""The vocabulary every package shares: ids, requests, and the records that cross packages.

Standard library and numpy only. No behaviour beyond derived properties, no tensors.
A type used by one package lives with its producer; a type used by three lives here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

RequestId = NewType("RequestId", str)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)
"""SHA-256 over (parent hash, token ids); the root is SHA-256 over (fingerprint, tenant salt)."""

TokenArray = npt.NDArray[np.int32]
BlockTable = npt.NDArray[np.int32]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class MissCause(StrEnum):
    """Why prompt tokens had to be computed although prefix caching exists."""

    NEVER_SEEN = "never_seen"
    EVICTED = "evicted"
    PARTIAL_BLOCK = "partial_block"
    """The prompt's last, not full block is never shared."""
    LAST_TOKEN = "last_token"
    """Everything was cached; the last token is computed again to get its logits."""
    WINDOW = "window"
    """Some group had the blocks, another group had lost a part of its window."""
    DISABLED = "disabled"
    PREEMPTED = "preempted"
    """Computed once, lost to preemption, computed again."""
    LOWERED = "lowered"
    """Cached once, but the low plane was dropped for want of memory and is gone: not at full precision."""


class PlaneVerb(StrEnum):
    """What happens to the low plane of a block."""

    DROP = "drop"
    """From its row in the device pool into the host arena."""
    RESTORE = "restore"
    """From the host arena into a row, bit for bit."""
    DISCARD = "discard"
    """Out of the host arena: its block is gone."""


class PlaneCause(StrEnum):
    """Why low planes move."""

    BUDGET = "budget"
    """The KV budget was lowered."""
    GROWTH = "growth"
    """A running request needed a block; the next resort was to preempt."""
    ADMISSION = "admission"
    """A waiting request needed room."""
    HIT = "hit"
    """A request hit the block and waits for its full precision."""
    RELIEF = "relief"
    """There is room again."""
    FAULT = "fault"
    """The host arena did not have what it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick the next tokens. `temperature == 0` is greedy; `top_k == 0` means off."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities; n >= 0: the chosen token's and the n most likely ones'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation request as the scheduler sees it.

    `priority`: larger is more urgent; priority > 0 may use the reserved headroom.
    `tenant` is accounting only; `cache_salt` separates cached blocks (never shared across salts).
    """

    request_id: RequestId
    prompt_token_ids: TokenArray
    sampling: SamplingParams
    arrival_s: float = 0.0
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """Copy one block's bytes (copy-on-write) before this step's writes, in every layer of `group`.

    `src_row`, `dst_row`: rows of their low planes where the pool assigns rows, else -1.
    """

    group: int
    src: BlockId
    dst: BlockId
    src_row: int = -1
    dst_row: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneMove:
    """Move the low plane of one block, in every layer and side of `group` that may be read without it.

    `row` is where it lies or will lie in the device pool; -1 for a discard. `cause` None: the block is gone.
    """

    verb: PlaneVerb
    group: int
    block: BlockId
    row: int = -1
    cause: PlaneCause | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledChunk:
    """The tokens of one request to run in one step: positions [start, start + len(token_ids)).

    `block_tables[g][i]` is the block of group g that holds positions [i*B, (i+1)*B). Entries that
    left a group's window hold the null id -1 and are never read.
    `samples` says whether the last position's logits are needed (prefill finished, or decode).
    `num_lowered_blocks`: blocks it reads without their low plane, over all groups; 0 is full precision.
    """

    request_id: RequestId
    token_ids: TokenArray
    start: int
    block_tables: tuple[BlockTable, ...]
    samples: bool
    num_lowered_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request left the queue: what prefix it hit and why the rest missed (in tokens)."""

    request_id: RequestId
    num_cached_tokens: int
    misses: Mapping[MissCause, int]
    is_resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeColumns:
    """Chunks of one token each, side by side: sequences that decode and read nothing below nominal precision.

    `request_ids` [S]; `token_ids` int32 [S] and `starts` int64 [S]: the token and its position; `num_blocks`
    int64 [S] and, per group, `block_tables` int32 [S, max(num_blocks)], -1 behind a sequence's blocks.
    """

    request_ids: Sequence[RequestId]
    token_ids: TokenArray
    starts: npt.NDArray[np.int64]
    num_blocks: npt.NDArray[np.int64]
    block_tables: tuple[npt.NDArray[np.int32], ...]

    def __len__(self) -> int:
        return len(self.request_ids)

    def chunks(self) -> list[ScheduledChunk]:
        """The same as records, one per sequence."""
        return [
            ScheduledChunk(
                request_id=request_id,
                token_ids=self.token_ids[i : i + 1],
                start=start,
                block_tables=tuple(table[i, :num_blocks] for table in self.block_tables),
                samples=True,
            )
            for i, (request_id, start, num_blocks) in enumerate(
                zip(self.request_ids, self.starts.tolist(), self.num_blocks.tolist(), strict=True)
            )
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class SchedulerOutput:
    """Everything the runner needs for one step. Decisions are data: log, metrics and simulator
    read the same record. `plane_moves` run in their order, drops before `copies`, restores after them.

    The step runs `decodes`, then `others`; `chunks` are both as records, made when they are asked for.
    """

    step: int
    decodes: DecodeColumns | None = None
    others: tuple[ScheduledChunk, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    admitted: tuple[Admission, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    plane_moves: tuple[PlaneMove, ...] = ()

    @functools.cached_property
    def chunks(self) -> tuple[ScheduledChunk, ...]:
        return (*(self.decodes.chunks() if self.decodes is not None else ()), *self.others)

    @property
    def num_chunks(self) -> int:
        return (len(self.decodes) if self.decodes is not None else 0) + len(self.others)

    @property
    def num_tokens(self) -> int:
        decodes = len(self.decodes) if self.decodes is not None else 0
        return decodes + sum(chunk.num_tokens for chunk in self.others)

    @property
    def sampling_ids(self) -> list[RequestId]:
        """The requests whose next token is sampled, in the order of the chunks."""
        decodes = list(self.decodes.request_ids) if self.decodes is not None else []
        return decodes + [chunk.request_id for chunk in self.others if chunk.samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One sampled token. `top` maps token id -> log-probability when log-probabilities were asked."""

    request_id: RequestId
    token_id: int
    logprob: float | None = None
    top: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOutput:
    """What one step produced: one entry for each chunk with `samples`."""

    sampled: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times in seconds. TPOT is the mean gap after the first token; None with one token."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    token_times_s: Sequence[float] = ()

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.token_times_s)]

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.arrival_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request's state as the user sees it; streaming yields these with `new_token_ids` filled."""

    request_id: RequestId
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    text: str
    num_cached_tokens: int
    finish_reason: FinishReason | None
    metrics: RequestMetrics
    new_token_ids: Sequence[int] = ()
    new_text: str = ""
    logprobs: Sequence[float] | None = None
    top_logprobs: Sequence[Mapping[int, float]] | None = None
    misses: Mapping[MissCause, int] = field(default_factory=dict)
    num_lowered_tokens: int = 0
    """Tokens computed while some block was read below nominal precision; 0 without a memory squeeze."""

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
