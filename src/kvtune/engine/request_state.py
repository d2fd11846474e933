"""What the engine remembers of one unfinished request: text, tokens, times. Blocks are not its business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvtune.engine.detokenizer import Detokenizer, TokenDecoder
from kvtune.engine.sampler import SampleRow
from kvtune.types import FinishReason, MissCause, Request, RequestMetrics, RequestOutput, Sampled

__all__ = ["RequestState"]


class RequestState:
    """Grows by the tokens the scheduler accepts; `output` is what the user sees."""

    def __init__(self, request: Request, *, seed: int, decoder: TokenDecoder | None) -> None:
        self.request = request
        self.seed = seed
        self.prompt_token_ids: tuple[int, ...] = tuple(request.prompt_token_ids.tolist())
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self._detokenizer = Detokenizer(decoder, request.sampling.stop)
        self._logprobs: list[float] = []
        self._top_logprobs: list[Mapping[int, float]] = []
        self._misses: Mapping[MissCause, int] = {}
        self._first_scheduled_s: float | None = None
        self._finished_s: float | None = None
        self._token_times_s: list[float] = []

    def admit(self, now_s: float, *, num_cached_tokens: int, misses: Mapping[MissCause, int]) -> None:
        """First admission: what the prefix cache gave. Later ones, after preemption, change nothing."""
        if self._first_scheduled_s is None:
            self._first_scheduled_s = now_s
            self.num_cached_tokens = num_cached_tokens
            self._misses = misses

    def sample_row(self) -> SampleRow:
        """What the sampler needs for the next token: the index survives preemption."""
        return SampleRow(
            self.request.request_id, self.request.sampling, self.seed, index=len(self.token_ids)
        )

    def append(
        self, token_ids: Sequence[int], sampled: Sampled, now_s: float, finish_reason: FinishReason | None
    ) -> str:
        """Add accepted tokens; returns the text that became final. Sets STOP when a stop string is found."""
        self.token_ids.extend(token_ids)
        self._token_times_s.extend([now_s] * len(token_ids))
        if sampled.logprob is not None:
            self._logprobs.append(sampled.logprob)
            self._top_logprobs.append(sampled.top or {})
        new_text = self._detokenizer.append(token_ids, is_last=finish_reason is not None)
        if self._detokenizer.is_stopped:
            finish_reason = FinishReason.STOP
        if finish_reason is not None:
            self.finish(finish_reason, now_s)
        return new_text

    def finish(self, reason: FinishReason, now_s: float) -> str:
        """Close the request; returns text that was still held back."""
        new_text = self._detokenizer.append((), is_last=True)
        self.finish_reason = reason
        self._finished_s = now_s
        return new_text

    def output(self, new_token_ids: Sequence[int] = (), new_text: str = "") -> RequestOutput:
        wants_logprobs = self.request.sampling.logprobs is not None
        return RequestOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text=self._detokenizer.text,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=self.finish_reason,
            metrics=RequestMetrics(
                arrival_s=self.request.arrival_s,
                first_scheduled_s=self._first_scheduled_s,
                first_token_s=self._token_times_s[0] if self._token_times_s else None,
                finished_s=self._finished_s,
                token_times_s=tuple(self._token_times_s),
            ),
            new_token_ids=tuple(new_token_ids),
            new_text=new_text,
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
            top_logprobs=tuple(self._top_logprobs) if wants_logprobs else None,
            misses=self._misses,
        )
