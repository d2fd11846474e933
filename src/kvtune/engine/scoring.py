"""Teacher-forced log-probabilities by chunked prefill through the paged cache.

Under read contract T0 one prefill of prompt + continuation reads exactly the keys and values that
token-by-token decoding would read, so a whole continuation costs one pass instead of a step per token.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from kvtune.cache import KVCacheManager, PrefixMatch
from kvtune.engine.runner import ModelRunner
from kvtune.errors import UsageError
from kvtune.target import ScoreItem, Scores
from kvtune.types import BlockCopy, BlockHash, RequestId, ScheduledChunk

__all__ = ["Scorer"]

_ROWS_AT_ONCE = 64
"""Logits rows turned into log-probabilities at a time: bounds the float32 temporary at 64 x V."""

_DECODES_AT_ONCE = 16
"""Items that decode together where a step takes one token of each: as served, in a sixteenth of the steps."""

_BUSY = "the KV cache is held by running requests; score when the engine is idle"


@dataclass(slots=True)
class _Part:
    """The scored rows of one step: [n, k], [n, k], [n], [n]."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    token_logprobs: npt.NDArray[np.float32]
    argmax: npt.NDArray[np.int32]


@dataclass(slots=True)
class _Progress:
    """One item under way. `tokens`: prompt + continuation; its last token is never run."""

    item: ScoreItem
    order: int
    request_id: RequestId
    tokens: npt.NDArray[np.int32]
    block_hashes: Sequence[BlockHash]
    position: int = 0
    parts: list[_Part] = field(default_factory=list[_Part])

    @property
    def first_scored(self) -> int:
        return len(self.item.prompt_token_ids) - 1

    @property
    def remaining(self) -> int:
        return len(self.tokens) - 1 - self.position

    def restart(self) -> None:
        self.position = 0
        self.parts.clear()


class _FirstCall(TypedDict, total=False):
    """What an item's first allocation brings."""

    match: PrefixMatch
    token_ids: npt.NDArray[np.int32]
    cache_salt: str


@dataclass(frozen=True, slots=True)
class _Planned:
    progress: _Progress
    chunk: ScheduledChunk


class Scorer:
    """Scores items through a runner and a manager; leaves no request and no block behind.

    Items of one call share cached prefixes among themselves, under a salt of their own: what was cached
    before cannot change the result, and what they cache is never hit by anyone else. A block no later
    item can hit is freed as soon as its item is done, so that users' prefixes leave only for want of room.
    """

    def __init__(self, runner: ModelRunner, manager: KVCacheManager, *, vocab_size: int) -> None:
        self._runner = runner
        self._manager = manager
        self._vocab_size = vocab_size
        self._num_calls = 0

    def score(self, items: Sequence[ScoreItem], *, num_top: int, chunk: int) -> list[Scores]:
        """Scores in item order; `chunk` tokens per step, or with 1 one token of each of a batch of items, as
        decoding goes. UsageError if an item cannot be held."""
        if num_top < 1 or chunk < 1:
            raise UsageError(f"num_top and chunk must be at least 1, found {num_top} and {chunk}")
        self._num_calls += 1
        salt = f"score/{self._num_calls}"
        waiting = deque(self._progress(item, order, salt) for order, item in enumerate(items))
        for progress in waiting:
            if not self._manager.fits(len(progress.tokens) - 1):
                raise UsageError(
                    f"score item {progress.item.item_id!r} has {len(progress.tokens)} tokens, more than the "
                    "KV cache holds; raise kv_budget"
                )
        budget = chunk if chunk > 1 else _DECODES_AT_ONCE
        wanted = Counter(block_hash for progress in waiting for block_hash in progress.block_hashes)
        active: deque[_Progress] = deque()
        done: dict[int, Scores] = {}
        try:
            while waiting or active:
                planned = self._continue_active(active, waiting, budget, chunk)
                left = budget - sum(plan.chunk.num_tokens for plan in planned)
                planned += self._start_waiting(active, waiting, left, chunk, salt)
                self._run_step(planned, num_top)
                for finished in [p for p in active if p.remaining == 0]:
                    active.remove(finished)
                    self._manager.free(finished.request_id)
                    wanted.subtract(finished.block_hashes)
                    self._manager.forget(h for h in finished.block_hashes if not wanted[h])
                    done[finished.order] = self._assemble(finished)
        finally:
            for progress in active:
                self._manager.free(progress.request_id)
            self._manager.forget(wanted)
        return [done[order] for order in range(len(items))]

    def _progress(self, item: ScoreItem, order: int, salt: str) -> _Progress:
        tokens = _tokens(item)
        hashes = self._manager.match(tokens, cache_salt=salt).block_hashes
        return _Progress(item, order, RequestId(f"{salt}/{order}"), tokens, hashes)

    def _continue_active(
        self, active: deque[_Progress], waiting: deque[_Progress], budget: int, chunk: int
    ) -> list[_Planned]:
        """Give tokens to what is under way, oldest first; without room the youngest starts again later."""
        planned: list[_Planned] = []
        for progress in list(active):
            while budget and progress in active:
                plan = self._plan(progress, min(budget, chunk), is_alone=len(active) == 1)
                if plan is not None:
                    planned.append(plan)
                    budget -= plan.chunk.num_tokens
                    break
                if len(active) == 1:
                    raise UsageError(_BUSY)
                youngest = active.pop()
                self._manager.free(youngest.request_id)
                youngest.restart()
                waiting.appendleft(youngest)
        return planned

    def _start_waiting(
        self, active: deque[_Progress], waiting: deque[_Progress], budget: int, chunk: int, salt: str
    ) -> list[_Planned]:
        planned: list[_Planned] = []
        while budget and waiting:
            progress = waiting[0]
            prompt = progress.tokens[: progress.first_scored + 1]
            match = self._manager.match(prompt, cache_salt=salt)
            progress.position = match.num_tokens
            first = _FirstCall(match=match, token_ids=prompt, cache_salt=salt)
            plan = self._plan(progress, min(budget, chunk), is_alone=not active, first=first)
            if plan is None:
                progress.restart()
                if not active:
                    raise UsageError(_BUSY)
                break
            active.append(waiting.popleft())
            planned.append(plan)
            budget -= plan.chunk.num_tokens
        return planned

    def _plan(
        self, progress: _Progress, most: int, *, is_alone: bool, first: _FirstCall | None = None
    ) -> _Planned | None:
        """A chunk of at most `most` tokens with slots for them; None without room.

        An item that is alone takes smaller chunks first: under a sliding window they need less room.
        """
        count = min(most, progress.remaining)
        while count:
            allocation = self._manager.allocate(
                progress.request_id, progress.position + count, **(first or _FirstCall())
            )
            if allocation is not None:
                return self._planned(progress, count, allocation.copies)
            count = count // 2 if is_alone else 0
        return None

    def _planned(self, progress: _Progress, count: int, copies: tuple[BlockCopy, ...]) -> _Planned:
        self._runner.copy_blocks(copies)
        start = progress.position
        chunk = ScheduledChunk(
            request_id=progress.request_id,
            token_ids=progress.tokens[start : start + count],
            start=start,
            block_tables=self._manager.block_tables(progress.request_id),
            samples=start + count > progress.first_scored,
        )
        return _Planned(progress, chunk)

    def _run_step(self, planned: Sequence[_Planned], num_top: int) -> None:
        offset, wanted = 0, list[npt.NDArray[np.int64]]()
        for plan in planned:
            skipped = max(0, plan.progress.first_scored - plan.chunk.start)
            wanted.append(offset + np.arange(skipped, plan.chunk.num_tokens))
            offset += plan.chunk.num_tokens
        logits = self._runner.forward([plan.chunk for plan in planned], np.concatenate(wanted))
        at = 0
        for plan, rows in zip(planned, wanted, strict=True):
            self._collect(plan, logits[at : at + len(rows)], num_top)
            at += len(rows)
            progress = plan.progress
            progress.position += plan.chunk.num_tokens
            self._manager.commit(progress.request_id, progress.tokens[: progress.position], progress.position)

    def _collect(self, plan: _Planned, logits: torch.Tensor, num_top: int) -> None:
        progress = plan.progress
        end = plan.chunk.start + plan.chunk.num_tokens  # row of position p scores token p + 1
        for first in range(0, len(logits), _ROWS_AT_ONCE):
            rows = logits[first : first + _ROWS_AT_ONCE]
            position = end - len(logits) + first
            targets = progress.tokens[position + 1 : position + 1 + len(rows)]
            at_ids = progress.item.at_ids
            if at_ids is not None:
                row = position - progress.first_scored
                at_ids = at_ids[row : row + len(rows)]
            progress.parts.append(_score_rows(rows, targets, at_ids, num_top))

    def _assemble(self, progress: _Progress) -> Scores:
        parts = progress.parts
        ids = np.concatenate([part.ids for part in parts])
        return Scores(
            item_id=progress.item.item_id,
            ids=ids,
            logprobs=np.concatenate([part.logprobs for part in parts]),
            token_logprobs=np.concatenate([part.token_logprobs for part in parts]),
            argmax=np.concatenate([part.argmax for part in parts]),
            is_full=progress.item.at_ids is None and ids.shape[1] == self._vocab_size,
        )


def _tokens(item: ScoreItem) -> npt.NDArray[np.int32]:
    return np.concatenate([
        np.asarray(item.prompt_token_ids, dtype=np.int32), np.asarray(item.continuation, dtype=np.int32)
    ])  # fmt: skip


def _score_rows(
    logits: torch.Tensor, targets: npt.NDArray[np.int32], at_ids: npt.NDArray[np.int32] | None, num_top: int
) -> _Part:
    """Log-softmax in float32 of logits [n, V]: at the given ids [n, k], else at all or the top ids."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    vocab = logprobs.shape[-1]
    if at_ids is not None:
        ids = torch.from_numpy(np.ascontiguousarray(at_ids, dtype=np.int64))
    elif vocab <= num_top:
        ids = torch.arange(vocab).expand(len(logprobs), vocab)
    else:
        ids = torch.topk(logprobs, num_top, dim=-1).indices
    known = ids >= 0  # an id of -1 asks for nothing
    chosen = torch.from_numpy(targets.astype(np.int64))[:, None]
    return _Part(
        ids=ids.to(torch.int32).numpy(),
        logprobs=torch.where(known, logprobs.gather(1, ids.clamp(min=0)), -torch.inf).numpy(),
        token_logprobs=logprobs.gather(1, chosen)[:, 0].numpy(),
        argmax=logprobs.argmax(dim=-1).to(torch.int32).numpy(),
    )
