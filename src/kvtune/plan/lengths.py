"""How long the requests of a workload are, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.workload import Workload, WorkloadRequest
from kvtune.workload.blocks import CHARACTERS_PER_TOKEN
from kvtune.workload.request import transcript

__all__ = ["LengthStatistics", "SequenceLengths", "length_statistics", "sequence_lengths"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLengths:
    """`tokens` int64 [R]: prompt and output of each request that states a length. `notes` say what had to be
    estimated or left out."""

    tokens: IntArray
    is_estimated: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """Tokens of prompt and output together."""

    num_requests: int
    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    is_estimated: bool


def sequence_lengths(workload: Workload) -> SequenceLengths:
    """Prompt plus output tokens per request. Text counts 4 characters to a token; an output nobody recorded
    counts as none. UsageError where no request states the length of its prompt."""
    lengths: list[int] = []
    num_estimated = num_without_output = num_unknown = 0
    for request in workload.requests:
        prompt, is_estimated = _prompt_tokens(request)
        if prompt is None or prompt < 1:
            num_unknown += 1
            continue
        output = _output_tokens(request)
        num_estimated += is_estimated
        num_without_output += output is None
        lengths.append(prompt + max(0, output or 0))
    if not lengths:
        raise UsageError(f"{workload.path or 'this workload'}: no request states the length of its prompt")
    notes = [
        (num_estimated, f"tokens estimated from text, {CHARACTERS_PER_TOKEN} characters each"),
        (num_without_output, "no output length recorded: counted by the prompt alone"),
        (num_unknown, "no prompt length: left out"),
    ]
    return SequenceLengths(
        tokens=np.asarray(lengths, dtype=np.int64),
        is_estimated=num_estimated > 0,
        notes=tuple(
            f"{count:,} of {len(workload.requests):,} requests: {text}" for count, text in notes if count
        ),
    )


def _prompt_tokens(request: WorkloadRequest) -> tuple[int | None, bool]:
    """(tokens of the prompt, whether they are estimated)."""
    if request.token_ids is not None:
        return len(request.token_ids), False
    if request.input_length is not None:
        return request.input_length, False
    if request.has_text:
        return _tokens_of(transcript(request)), True
    return None, False


def _output_tokens(request: WorkloadRequest) -> int | None:
    if request.output_length is not None:
        return request.output_length
    return None if request.answer is None else _tokens_of(request.answer)


def _tokens_of(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def length_statistics(lengths: SequenceLengths) -> LengthStatistics:
    """Quantiles of the lengths, as whole tokens that really occur."""
    p50, p90, p99 = np.percentile(lengths.tokens, [50, 90, 99], method="higher").tolist()
    return LengthStatistics(
        num_requests=len(lengths.tokens),
        mean=float(lengths.tokens.mean()),
        p50=int(p50),
        p90=int(p90),
        p99=int(p99),
        max=int(lengths.tokens.max()),
        is_estimated=lengths.is_estimated,
    )
