"""One request's life in the scheduler: its tokens, how far they are computed, its times."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Protocol

import numpy as np

from kvtune.types import (
    BlockHash,
    FinishReason,
    MissCause,
    Request,
    RequestId,
    RequestMetrics,
    SamplingParams,
    TokenArray,
)

__all__ = ["Lane", "Sequence", "SequenceView", "Status", "service_order"]


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class SequenceView(Protocol):
    """What others may read of a sequence. Live: it shows the state of the moment."""

    @property
    def request(self) -> Request: ...
    @property
    def request_id(self) -> RequestId: ...
    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def status(self) -> Status: ...
    @property
    def token_ids(self) -> TokenArray:
        """Prompt and output, int32, read-only."""
        ...

    @property
    def prompt_token_ids(self) -> TokenArray: ...
    @property
    def output_token_ids(self) -> TokenArray: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int:
        """Also the index of the next token to sample, whatever preemptions came between."""
        ...

    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that need not be computed when the request was first admitted."""
        ...

    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_lowered_tokens(self) -> int:
        """Tokens computed while some block was read below nominal precision."""
        ...

    @property
    def misses(self) -> Mapping[MissCause, int]: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def metrics(self) -> RequestMetrics: ...


class Lane(Protocol):
    """Where the counters of decoding sequences are columns; `DecodeLane` is one."""

    num_uncomputed: int
    last_step: int

    def num_tokens(self, row: int) -> int: ...
    def since(self, row: int, num_known: int) -> tuple[TokenArray, list[float]]:
        """Tokens behind the first `num_known`, and their times."""
        ...


class Sequence:
    """The scheduler's own record; only `Scheduler` writes it. In a lane, its newest tokens are there."""

    def __init__(self, request: Request, prompt: TokenArray, *, order: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.order = order
        self.key = (-request.priority, request.arrival_s, order)
        """Service order: priority, then arrival, then submission."""
        self.status = Status.WAITING
        self.num_prompt_tokens = len(prompt)
        self._num_tokens = len(prompt)
        self._num_computed = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_lowered_tokens = 0
        self.num_slots = 0  # tokens the manager need not be asked for, while it runs
        self.last_step = 0  # in which it was scheduled last
        self.awaits_planes = False  # it hit blocks whose low planes are on their way back
        self.most_computed_tokens = 0  # what recomputation after a preemption is measured against
        self.misses: Mapping[MissCause, int] = {}
        self.finish_reason: FinishReason | None = None
        self.block_hashes: collections.abc.Sequence[BlockHash] = ()  # of leading full blocks, as far as known
        self.awaited: BlockHash | None = None  # block of this prefix another request is computing
        self._buffer: TokenArray = np.array(prompt, dtype=np.int32)
        self._first_scheduled_s: float | None = None
        self._finished_s: float | None = None
        self._token_times_s: list[float] = []
        self._lane: Lane | None = None
        self.row = -1  # in the lane

    # --- in the lane and out of it

    @property
    def is_in_lane(self) -> bool:
        return self._lane is not None

    def enter(self, lane: Lane, row: int) -> None:
        self._lane, self.row = lane, row

    def catch_up(self) -> None:
        """Take over what the lane has of its tokens."""
        if self._lane is None:
            return
        tokens, times_s = self._lane.since(self.row, self._num_tokens)
        if len(tokens):
            self.extend(tokens, times_s)
        self._num_computed = self._num_tokens - self._lane.num_uncomputed
        self.most_computed_tokens = max(self.most_computed_tokens, self._num_computed)

    def leave(self) -> None:
        """Out of the lane, with everything it has."""
        self.catch_up()
        if self._lane is not None:
            self.last_step = max(self.last_step, self._lane.last_step)
        self._lane, self.row = None, -1

    @property
    def num_tokens(self) -> int:
        return self._num_tokens if self._lane is None else self._lane.num_tokens(self.row)

    @property
    def num_computed_tokens(self) -> int:
        lane = self._lane
        return self._num_computed if lane is None else lane.num_tokens(self.row) - lane.num_uncomputed

    @property
    def token_ids(self) -> TokenArray:
        self.catch_up()
        view = self._buffer[: self._num_tokens]
        view.flags.writeable = False
        return view

    @property
    def last_token_id(self) -> int:
        self.catch_up()
        return int(self._buffer[self._num_tokens - 1])

    @property
    def prompt_token_ids(self) -> TokenArray:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> TokenArray:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        if self._lane is not None:
            return True
        return self._num_tokens - self._num_computed == 1 and self._num_tokens > self.num_prompt_tokens

    @property
    def metrics(self) -> RequestMetrics:
        self.catch_up()
        times = tuple(self._token_times_s)
        return RequestMetrics(
            arrival_s=self.request.arrival_s,
            first_scheduled_s=self._first_scheduled_s,
            first_token_s=times[0] if times else None,
            finished_s=self._finished_s,
            token_times_s=times,
        )

    def start(self, now_s: float, *, num_computed_tokens: int) -> None:
        """The sequence left the queue with this many tokens computed already."""
        self.status = Status.RUNNING
        self.num_slots = 0
        self._num_computed = num_computed_tokens
        self.most_computed_tokens = max(self.most_computed_tokens, num_computed_tokens)
        self.awaited = None
        if self._first_scheduled_s is None:
            self._first_scheduled_s = now_s

    def chunk(self, num_tokens: int) -> TokenArray:
        """A copy of the next `num_tokens` to compute."""
        start = self._num_computed
        return self._buffer[start : start + num_tokens].copy()

    def computed(self, num_tokens: int, *, lowered: bool = False) -> None:
        """`lowered`: some block was read below nominal precision."""
        if lowered:
            self.num_lowered_tokens += num_tokens
        self._num_computed += num_tokens
        self.most_computed_tokens = max(self.most_computed_tokens, self._num_computed)

    def append(self, token_id: int, now_s: float) -> None:
        """Take one sampled token."""
        num_tokens = self._num_tokens
        if num_tokens == len(self._buffer):
            self._lengthen(2 * num_tokens)
        self._buffer[num_tokens] = token_id
        self._num_tokens = num_tokens + 1
        self._token_times_s.append(now_s)

    def extend(self, token_ids: TokenArray, times_s: Iterable[float]) -> None:
        """Take the tokens of several steps at once."""
        start = self._num_tokens
        end = start + len(token_ids)
        if end > len(self._buffer):
            self._lengthen(2 * end)
        self._buffer[start:end] = token_ids
        self._num_tokens = end
        self._token_times_s.extend(times_s)

    def _lengthen(self, length: int) -> None:
        longer = np.empty(max(16, length), dtype=np.int32)
        longer[: self._num_tokens] = self._buffer[: self._num_tokens]
        self._buffer = longer

    def inherit(self, parent: Sequence) -> None:
        """Continue from the parent's tokens, as a fork does."""
        self._buffer = parent.token_ids.copy()
        self._num_tokens = parent.num_tokens
        self.num_prompt_tokens = parent.num_prompt_tokens
        self.num_cached_tokens = min(parent.num_computed_tokens, parent.num_prompt_tokens)
        self.num_lowered_tokens = parent.num_lowered_tokens
        self.misses = {}

    def preempt(self) -> None:
        """Back to the queue without blocks; tokens and the sampling position stay."""
        self.status = Status.WAITING
        self.awaits_planes = False
        self._num_computed = 0
        self.num_preemptions += 1

    def finish(self, reason: FinishReason, now_s: float) -> None:
        self.status = Status.FINISHED
        self.finish_reason = reason
        self._finished_s = now_s

    def stop_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end it before its length does."""
        stops = frozenset(self.sampling.stop_token_ids)
        return stops if self.sampling.ignore_eos else stops | eos_token_ids

    def stop_reason(
        self, last: int, num_tokens: int, eos_token_ids: frozenset[int], max_model_len: int
    ) -> FinishReason | None:
        """Whether it ends with `num_tokens` tokens, the last of which is `last`."""
        sampling = self.sampling
        if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in eos_token_ids):
            return FinishReason.STOP
        if num_tokens - self.num_prompt_tokens >= sampling.max_tokens or num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None


def service_order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.key
