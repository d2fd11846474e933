"""What the engine adds to a scheduled sequence: text, stop strings, log-probabilities, its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvtune.engine.detokenizer import Detokenizer, TokenDecoder
from kvtune.engine.sampler import SampleRow
from kvtune.sched import SequenceView
from kvtune.types import RequestOutput, Sampled

__all__ = ["RequestState"]


class RequestState:
    """One unfinished request. Tokens, times and the finish reason are the scheduler's; this reads them."""

    def __init__(self, sequence: SequenceView, *, seed: int, decoder: TokenDecoder | None) -> None:
        self.sequence = sequence
        self._seed = seed
        self._prompt_token_ids: tuple[int, ...] = tuple(sequence.prompt_token_ids.tolist())
        self._detokenizer = Detokenizer(decoder, sequence.sampling.stop)
        self._logprobs: list[float] = []
        self._top_logprobs: list[Mapping[int, float]] = []

    @property
    def is_finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._detokenizer.is_stopped

    def sample_row(self) -> SampleRow:
        """What the sampler needs for the next token; the index counts on through preemptions."""
        sequence = self.sequence
        return SampleRow(sequence.request_id, sequence.sampling, self._seed, sequence.num_output_tokens)

    def append(self, token_ids: Sequence[int], sampled: Sampled) -> str:
        """Take tokens the scheduler has accepted; returns the text that became final."""
        if sampled.logprob is not None:
            self._logprobs.append(sampled.logprob)
            self._top_logprobs.append(sampled.top or {})
        return self._detokenizer.append(token_ids, is_last=self.is_finished)

    def flush(self) -> str:
        """Text still held back when the request ends otherwise than by a token."""
        return self._detokenizer.append((), is_last=True)

    def output(self, new_token_ids: Sequence[int] = (), new_text: str = "") -> RequestOutput:
        sequence = self.sequence
        wants_logprobs = sequence.sampling.logprobs is not None
        return RequestOutput(
            request_id=sequence.request_id,
            prompt_token_ids=self._prompt_token_ids,
            token_ids=tuple(sequence.output_token_ids.tolist()),
            text=self._detokenizer.text,
            num_cached_tokens=sequence.num_cached_tokens,
            finish_reason=sequence.finish_reason,
            metrics=sequence.metrics,
            new_token_ids=tuple(new_token_ids),
            new_text=new_text,
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
            top_logprobs=tuple(self._top_logprobs) if wants_logprobs else None,
            misses=sequence.misses,
            num_lowered_tokens=sequence.num_lowered_tokens,
        )
