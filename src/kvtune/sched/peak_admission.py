"""Admission by what the batch will hold at its fullest, instead of by what is free now.

A request is admitted while the expected peak of the batch with it, plus `admission_z` standard deviations,
fits the cache: LightLLM's peak formula ("Past-Future", ASPLOS'25) over survival curves of the outputs. Only
distributions of the batch are summed: reserving every request's own p95 would leave half the cache empty.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvtune.cache import KVCacheManager, PrefixMatch
from kvtune.config import SchedulerConfig
from kvtune.predict import (
    Growth,
    LengthDistribution,
    LengthKey,
    LengthPredictor,
    PrefixSessions,
    horizons_of,
    peak_forecast,
    survival_rows,
)
from kvtune.sched import sequence as live
from kvtune.sched.admission import growth_reserve
from kvtune.types import FinishReason, RequestId

__all__ = ["OutputLengths", "PeakAdmission"]

_REMEMBERED_BLOCKS = 1 << 16
"""About 20 MB at most."""
_RECHECK_AFTER = 8
"""Steps before a refused request is looked at again, unless somebody left: survival alone changes slowly."""


class OutputLengths(Protocol):
    """Where length forecasts come from; `LengthPredictor` is one."""

    @property
    def is_ready(self) -> bool: ...
    def predict(self, key: LengthKey, *, max_tokens: int | None = None) -> LengthDistribution: ...
    def observe(self, key: LengthKey, length: int, *, is_censored: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What is believed of one request; `key` None where its length is certain and teaches nothing."""

    key: LengthKey | None
    output: LengthDistribution
    kept: tuple[int, ...] = ()
    """Per group, matched blocks that others held when it came."""


class PeakAdmission:
    """The forecasts of all live requests. Written by `Scheduler` alone; deterministic."""

    def __init__(
        self, manager: KVCacheManager, *, max_model_len: int, lengths: OutputLengths | None = None
    ) -> None:
        self._manager = manager
        self._max_model_len = max_model_len
        self._lengths: OutputLengths = lengths if lengths is not None else LengthPredictor()
        self._sessions = PrefixSessions(max_blocks=_REMEMBERED_BLOCKS)
        self._outlooks: dict[RequestId, _Outlook] = {}
        self._refused: RequestId | None = None
        self._wait = 0
        self.num_refused = 0

    def admits(
        self,
        candidate: live.Sequence,
        match: PrefixMatch,
        running: Sequence[live.Sequence],
        config: SchedulerConfig,
    ) -> bool:
        """Whether the batch with the candidate is expected to fit to its end."""
        if self._refused == candidate.request_id and self._wait > 0:
            self._wait -= 1
            return False
        outlook = self._outlook(candidate, match.block_hashes)
        self._outlooks[candidate.request_id] = replace(outlook, kept=self._manager.held_by_others(match))
        is_known = outlook.key is None or self._lengths.is_ready
        if not is_known or not running or self._fits(candidate, running, config):
            self._refused = None
            return True
        self._refused, self._wait = candidate.request_id, _RECHECK_AFTER
        self.num_refused += 1
        return False

    def left(self) -> None:
        """Somebody gave blocks back: look again at once."""
        self._wait = 0

    def ended(self, sequence: live.Sequence, reason: FinishReason) -> None:
        """Learn from a request that is over, one that never ran included."""
        outlook = self._outlooks.pop(sequence.request_id, None)
        is_censored = reason is not FinishReason.STOP
        says_something = sequence.num_output_tokens > 0 or not is_censored
        if outlook is not None and outlook.key is not None and says_something:
            self._lengths.observe(outlook.key, sequence.num_output_tokens, is_censored=is_censored)

    # --- inside

    def _outlook(self, sequence: live.Sequence, block_hashes: Sequence[Hashable] = ()) -> _Outlook:
        outlook = self._outlooks.get(sequence.request_id)
        if outlook is None:
            outlook = self._outlooks[sequence.request_id] = self._first_outlook(sequence, block_hashes)
        return outlook

    def _first_outlook(self, sequence: live.Sequence, block_hashes: Sequence[Hashable]) -> _Outlook:
        sampling = sequence.sampling
        limit = min(sampling.max_tokens, self._max_model_len - sequence.num_prompt_tokens)
        if sampling.ignore_eos and not sampling.stop_token_ids:
            return _Outlook(None, LengthDistribution.known(limit))
        prompt = block_hashes[: sequence.num_prompt_tokens // self._manager.block_size]
        seen = self._sessions.look(prompt)
        self._sessions.add(prompt)
        key = LengthKey(
            client=sequence.request.tenant,
            session="" if seen.session is None else seen.session,
            prompt_tokens=sequence.num_prompt_tokens,
            new_tokens=sequence.num_prompt_tokens - seen.num_known * self._manager.block_size,
        )
        return _Outlook(key, self._lengths.predict(key, max_tokens=limit))

    def _growth(self, sequence: live.Sequence, group: int, own_first: int) -> Growth:
        outlook = self._outlook(sequence)
        return Growth(
            num_tokens=sequence.num_tokens,
            generated=sequence.num_output_tokens,
            kept_blocks=own_first + (outlook.kept[group] if outlook.kept else 0),
            output=outlook.output,
        )

    def _fits(
        self, candidate: live.Sequence, running: Sequence[live.Sequence], config: SchedulerConfig
    ) -> bool:
        manager = self._manager
        reserve = growth_reserve(config, candidate.request.priority)
        batch = [*running, candidate]
        held = [manager.held_blocks(s.request_id) for s in running]
        survival = None
        for usage in manager.usage():
            g = usage.group
            own_first = 1 if usage.first.total else 0
            rows = [self._growth(s, g, own_first) for s in batch]
            own = sum(max(0, h[g] - row.kept_blocks) for h, row in zip(held, rows, strict=False))
            if survival is None:  # the same sequences in every group
                survival = survival_rows(rows, horizons_of(rows))
            peak = peak_forecast(
                rows,
                block_size=manager.block_size,
                base_blocks=max(0.0, float(usage.body.referenced - own)),
                window_blocks=manager.window_blocks(g),
                z=config.admission_z,
                survival=survival,
            )
            if peak.high > usage.body.total * (1.0 - reserve):
                return False
        return True
