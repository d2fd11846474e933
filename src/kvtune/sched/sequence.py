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

__all__ = ["Sequence", "SequenceView", "Status"]


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


class Sequence:
    """The scheduler's own record; only `Scheduler` writes it."""

    def __init__(self, request: Request, prompt: TokenArray, *, order: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.order = order
        self.key = (-request.priority, request.arrival_s, order)
        """Service order: priority, then arrival, then submission."""
        self.status = Status.WAITING
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt)
        self.num_computed_tokens = 0
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

    @property
    def token_ids(self) -> TokenArray:
        view = self._buffer[: self.num_tokens]
        view.flags.writeable = False
        return view

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
        return self.num_tokens - self.num_computed_tokens == 1 and self.num_tokens > self.num_prompt_tokens

    @property
    def metrics(self) -> RequestMetrics:
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
        self.num_computed_tokens = num_computed_tokens
        self.most_computed_tokens = max(self.most_computed_tokens, num_computed_tokens)
        self.awaited = None
        if self._first_scheduled_s is None:
            self._first_scheduled_s = now_s

    def chunk(self, num_tokens: int) -> TokenArray:
        """A copy of the next `num_tokens` to compute."""
        start = self.num_computed_tokens
        return self._buffer[start : start + num_tokens].copy()

    def computed(self, num_tokens: int, *, lowered: bool = False) -> None:
        """`lowered`: some block was read below nominal precision."""
        if lowered:
            self.num_lowered_tokens += num_tokens
        self.num_computed_tokens += num_tokens
        self.most_computed_tokens = max(self.most_computed_tokens, self.num_computed_tokens)

    def append(self, token_id: int, now_s: float) -> None:
        """Take one sampled token."""
        if self.num_tokens == len(self._buffer):
            grown = np.empty(max(16, 2 * len(self._buffer)), dtype=np.int32)
            grown[: self.num_tokens] = self._buffer
            self._buffer = grown
        self._buffer[self.num_tokens] = token_id
        self.num_tokens += 1
        self._token_times_s.append(now_s)

    def extend(self, token_ids: TokenArray, times_s: Iterable[float]) -> None:
        """Take the tokens of several steps at once."""
        end = self.num_tokens + len(token_ids)
        if end > len(self._buffer):
            grown = np.empty(max(16, 2 * end), dtype=np.int32)
            grown[: self.num_tokens] = self._buffer[: self.num_tokens]
            self._buffer = grown
        self._buffer[self.num_tokens : end] = token_ids
        self.num_tokens = end
        self._token_times_s.extend(times_s)

    def inherit(self, parent: Sequence) -> None:
        """Continue from the parent's tokens, as a fork does."""
        self._buffer = parent.token_ids.copy()
        self.num_tokens = parent.num_tokens
        self.num_prompt_tokens = parent.num_prompt_tokens
        self.num_cached_tokens = min(parent.num_computed_tokens, parent.num_prompt_tokens)
        self.num_lowered_tokens = parent.num_lowered_tokens
        self.misses = {}

    def preempt(self) -> None:
        """Back to the queue without blocks; tokens and the sampling position stay."""
        self.status = Status.WAITING
        self.awaits_planes = False
        self.num_computed_tokens = 0
        self.num_preemptions += 1

    def finish(self, reason: FinishReason, now_s: float) -> None:
        self.status = Status.FINISHED
        self.finish_reason = reason
        self._finished_s = now_s

    def may_stop_early(self, eos_token_ids: frozenset[int]) -> bool:
        """Whether a token may end it before its length does."""
        sampling = self.sampling
        return bool(sampling.stop_token_ids or (eos_token_ids and not sampling.ignore_eos))

    def stop_reason(self, eos_token_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Whether the token appended last ends the sequence."""
        sampling, num_tokens = self.sampling, self.num_tokens
        if sampling.stop_token_ids or (eos_token_ids and not sampling.ignore_eos):
            last = int(self._buffer[num_tokens - 1])
            if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in eos_token_ids):
                return FinishReason.STOP
        if num_tokens - self.num_prompt_tokens >= sampling.max_tokens or num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None
