"""Requests as the simulator takes them: lengths, and tokens or, where they are not known, block names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.types import BlockHash, Request, RequestId, SamplingParams, TokenArray
from kvtune.workload import (
    DEFAULT_MAX_TOKENS,
    Materialised,
    Rejection,
    Workload,
    WorkloadRequest,
    block_trace,
)

__all__ = ["SimRequest", "SimWorkload", "of_tokens", "of_trace"]

CHARACTERS_PER_TOKEN = 4
_NAME_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """One request with the number of tokens it will generate, which the scheduler does not get to see.

    Prompt identity is the first of these that is there: `prompt_token_ids` int32 [num_prompt_tokens];
    `block_names` int64, one per leading full block (equal names: equal whole prefixes); nothing: shares
    with nobody. `output_token_ids` int32: what it generates; None: tokens no other request generates.
    """

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_token_ids: TokenArray | None = None
    block_names: npt.NDArray[np.int64] | None = None
    output_token_ids: TokenArray | None = None
    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""

    def to_request(self, own_token: int) -> Request:
        """For the scheduler. `own_token`, a number no other request has, stands for tokens not known."""
        tokens = self.prompt_token_ids
        if tokens is None:
            tokens = np.full(self.num_prompt_tokens, own_token, dtype=np.int32)
        return Request(
            request_id=RequestId(self.request_id),
            prompt_token_ids=tokens,
            sampling=SamplingParams(max_tokens=self.num_output_tokens, temperature=0.0, ignore_eos=True),
            arrival_s=self.arrival_s,
            priority=self.priority,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
        )

    def block_hashes(self, own_token: int, block_size: int) -> tuple[BlockHash, ...]:
        """Identities of leading full blocks; empty where they follow from the tokens."""
        if self.prompt_token_ids is not None:
            return ()
        num_full = self.num_prompt_tokens // block_size
        names = np.empty((num_full, 2), dtype=np.int64)
        names[:, 0] = -1 - own_token
        names[:, 1] = np.arange(num_full)
        if self.block_names is not None:
            known = self.block_names[:num_full]
            names[: len(known), 0] = 0
            names[: len(known), 1] = known
        data = names.tobytes()
        return tuple(BlockHash(data[at : at + _NAME_BYTES]) for at in range(0, len(data), _NAME_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimWorkload:
    """Requests in arrival order, those that can never be served, and what the user should know."""

    requests: tuple[SimRequest, ...]
    rejected: tuple[Rejection, ...] = ()
    notes: tuple[str, ...] = ()

    def scaled_in_time(self, rate_factor: float) -> SimWorkload:
        """The same requests, `rate_factor` times as many a second. UsageError unless above zero."""
        if not 0 < rate_factor < float("inf"):
            raise UsageError(f"a rate factor must be above zero and finite, found {rate_factor}")
        sped = tuple(replace(r, arrival_s=r.arrival_s / rate_factor) for r in self.requests)
        return replace(self, requests=sped)


def of_tokens(materialised: Materialised) -> SimWorkload:
    """A workload of token ids, as an engine would be sent it."""
    requests = tuple(
        SimRequest(
            request_id=request.request_id,
            arrival_s=request.arrival_s,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.max_tokens,
            prompt_token_ids=np.array(request.prompt_token_ids, dtype=np.int32),
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        for request in materialised.requests
    )
    return SimWorkload(requests=requests, rejected=materialised.rejected, notes=materialised.notes)


def of_trace(
    workload: Workload, *, block_size: int, max_model_len: int, max_tokens: int | None = None
) -> SimWorkload:
    """A trace by its lengths and block identities; tokens are never made.

    Text is measured in characters (four a token), as no tokenizer is asked. `max_tokens` caps what is
    generated. UsageError when no request fits into `max_model_len`.
    """
    names, lengths, notes = _prompts(workload, block_size)
    accepted: list[SimRequest] = []
    rejected: list[Rejection] = []
    for request, own_names, length in zip(workload.requests, names, lengths, strict=True):
        output = _output_length(request, max_tokens)
        problem = _problem(request, length, output, max_model_len)
        if problem is not None:
            rejected.append(Rejection(request_id=request.request_id, reason=problem))
            continue
        accepted.append(
            SimRequest(
                request_id=request.request_id,
                arrival_s=request.arrival_s,
                num_prompt_tokens=length,
                num_output_tokens=output,
                block_names=own_names,
                cache_salt=request.cache_salt,
                priority=request.priority,
            )
        )
    if not accepted:
        raise UsageError(
            f"none of the {len(rejected)} requests can be served (first: {rejected[0].reason}); "
            "use another trace, a smaller --scale or a larger model length"
        )
    if rejected:
        notes = (
            *notes,
            f"{len(rejected):,} of {len(workload.requests):,} requests left out: {_summary(rejected)}",
        )
    return SimWorkload(requests=tuple(accepted), rejected=tuple(rejected), notes=notes)


Names = Sequence[npt.NDArray[np.int64] | None]


def _prompts(workload: Workload, block_size: int) -> tuple[Names, list[int], tuple[str, ...]]:
    """Block names and prompt tokens of each request."""
    has_content = any(
        r.has_text or r.token_ids is not None or r.hash_ids is not None for r in workload.requests
    )
    if not has_content:
        lengths = [request.input_length or 0 for request in workload.requests]
        note = "the trace holds lengths only: no prompt shares a prefix with another"
        return [None] * len(lengths), lengths, (note,)
    trace = block_trace(workload, block_size)
    bounds = trace.request_start.tolist()
    names = [trace.block_ids[a:b] for a, b in itertools.pairwise(bounds)]
    return names, trace.prompt_tokens.tolist(), trace.notes


def _output_length(request: WorkloadRequest, cap: int | None) -> int:
    if request.output_length is not None:
        length = request.output_length
    elif request.answer:
        length = -(-len(request.answer) // CHARACTERS_PER_TOKEN)
    else:
        length = request.max_tokens or cap or DEFAULT_MAX_TOKENS
    return length if cap is None else min(length, cap)


def _problem(request: WorkloadRequest, prompt: int, output: int, max_model_len: int) -> str | None:
    if request.problem is not None:
        return f"unsupported content: {request.problem}"
    if prompt < 1:
        return "empty prompt"
    if output < 1:
        return "nothing to generate"
    if prompt + output > max_model_len:
        return f"too long: {prompt} prompt and {output} output tokens, the model holds {max_model_len}"
    return None


def _summary(rejected: Sequence[Rejection]) -> str:
    kinds: dict[str, int] = {}
    for rejection in rejected:
        kind = rejection.reason.partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda kv: -kv[1]))
    return f"{shown} (first: {rejected[0].reason})"
