"""The reference run and replays of it: what the gate asks of an engine.

The baseline generates a continuation for each request, greedily; every configuration then scores those
same tokens by one chunked prefill of prompt + continuation. Under the T0 read contract that equals
token-by-token decoding, at the price of one forward pass; the decode replay (one token a step) is taken
on a subset, through the kernels that will serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvtune.errors import InvariantError, TargetError
from kvtune.quality.levels import looks_of
from kvtune.target import LoadRequest, RunningTarget, ScoreItem, Scores
from kvtune.workload import TokenRequest

__all__ = [
    "Reference",
    "ReplaySettings",
    "decode_subset",
    "length_bucket",
    "record_reference",
    "replay",
    "replay_decode",
]

REFERENCE_BYTES = 160 * 2**20
"""Memory for the reference's log-probabilities (8 bytes per id); it bounds k for large vocabularies."""

MIN_TOP = 64

LENGTH_EDGES = (256, 1024, 4096, 16384)
"""Prompt lengths in tokens that separate the strata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """How to replay. `chunk` and `aa_chunk`: tokens per step of the replay and of its A/A control; a
    `chunk` of None is as the baseline is served, and the same for every candidate. `max_top`: most ids
    kept per token.

    `max_tokens`: longest continuation scored. `num_decode`: requests replayed one token at a time, those
    of at most `decode_max_length` tokens first.
    """

    chunk: int | None = None
    aa_chunk: int = 96
    max_tokens: int = 64
    max_top: int = 8192
    num_decode: int = 16
    decode_max_length: int = 1024
    decode_budget_tokens: int = 8192
    """Steps the decode replay may take in all, prompts included; fewer requests are replayed beyond it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The baseline's answers and scores, its own A/A replay, and where each item belongs.

    `clusters`, `strata`: one entry per item. `decode` is the baseline replayed one token a step, on
    `decode_items` (indices into `items`), as the floor of the candidate's decode replay.
    """

    items: tuple[ScoreItem, ...]
    scores: tuple[Scores, ...]
    aa_scores: tuple[Scores, ...]
    clusters: tuple[str, ...]
    strata: tuple[Mapping[str, str], ...]
    decode_items: tuple[int, ...] = ()
    decode_scores: tuple[Scores, ...] = ()
    is_synthetic_text: bool = False
    chunk: int | None = None
    """Tokens per step of every replay that is compared with `scores`."""

    @property
    def num_top(self) -> int:
        """Token ids known per scored token; the vocabulary's size where scores are full."""
        return self.scores[0].ids.shape[1]

    def head(self, count: int) -> Reference:
        """The first `count` items and all that was recorded of them; decode items must be among them."""
        if count >= len(self.items):
            return self
        if any(i >= count for i in self.decode_items):
            raise InvariantError(f"a decode item lies beyond the first {count} items")
        return replace(
            self, items=self.items[:count], scores=self.scores[:count], aa_scores=self.aa_scores[:count],
            clusters=self.clusters[:count], strata=self.strata[:count],
        )  # fmt: skip


def record_reference(
    running: RunningTarget, requests: Sequence[TokenRequest], settings: ReplaySettings, *,
    is_synthetic_text: bool = False, num_decode: int | None = None,
) -> Reference:  # fmt: skip
    """Generate, score and replay under the started baseline. TargetError if nothing was generated."""
    lengths = [max(1, min(r.max_tokens, settings.max_tokens)) for r in requests]
    answers = running.generate(
        [
            LoadRequest(
                request_id=r.request_id, prompt_token_ids=r.prompt_token_ids, max_tokens=n,
                cache_salt=r.cache_salt,
            )
            for r, n in zip(requests, lengths, strict=True)
        ]
    )  # fmt: skip
    kept = [(r, tuple(a)) for r, a in zip(requests, answers, strict=True) if len(a)]
    if not kept:
        raise TargetError("the baseline generated no token for any request; there is nothing to score")
    bare = [ScoreItem(item_id=r.request_id, prompt_token_ids=r.prompt_token_ids, continuation=a)
            for r, a in kept]  # fmt: skip
    num_top = min(settings.max_top, affordable_top(sum(len(a) for _, a in kept)))
    chunk = settings.chunk or running.effective.get("max_num_batched_tokens")
    scores = _score(running, bare, num_top=num_top, chunk=chunk)
    items = tuple(
        item if score.is_full else replace(item, at_ids=score.ids)
        for item, score in zip(bare, scores, strict=True)
    )
    count = settings.num_decode if num_decode is None else num_decode
    first_look = looks_of(len(items))[0].num_items  # early looks need their decode items, too
    chosen = decode_subset(
        items[:first_look],
        count=count,
        max_length=settings.decode_max_length,
        max_tokens=settings.decode_budget_tokens,
    )
    return Reference(
        items=items, scores=scores,
        aa_scores=_score(running, items, num_top=num_top, chunk=settings.aa_chunk),
        clusters=tuple(r.session_id or r.request_id for r, _ in kept),
        strata=tuple(_strata(r) for r, _ in kept),
        decode_items=chosen,
        decode_scores=replay_decode(running, items, chosen, num_top=scores[0].ids.shape[1]),
        is_synthetic_text=is_synthetic_text, chunk=chunk,
    )  # fmt: skip


def replay(running: RunningTarget, reference: Reference) -> tuple[Scores, ...]:
    """The candidate's scores of the reference's tokens, in item order, cut into the reference's steps."""
    return _score(running, reference.items, num_top=reference.num_top, chunk=reference.chunk)


def replay_decode(
    running: RunningTarget, items: Sequence[ScoreItem], chosen: Sequence[int], *, num_top: int
) -> tuple[Scores, ...]:
    """Scores of the chosen items, one token a step."""
    if not chosen:
        return ()
    return _score(running, [items[i] for i in chosen], num_top=num_top, chunk=1)


def _score(
    running: RunningTarget, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None
) -> tuple[Scores, ...]:
    scores = tuple(running.score(items, num_top=num_top, chunk=chunk))
    if len(scores) != len(items):
        raise TargetError(f"asked the engine to score {len(items)} requests, found {len(scores)} answers")
    return scores


def affordable_top(num_tokens: int) -> int:
    """Token ids kept per scored token so that the reference stays within REFERENCE_BYTES."""
    return max(MIN_TOP, REFERENCE_BYTES // (8 * max(1, num_tokens)))


def decode_subset(
    items: Sequence[ScoreItem], *, count: int, max_length: int, max_tokens: int
) -> tuple[int, ...]:
    """Indices of up to `count` items spread evenly over lengths; those beyond `max_length` only if needed.

    One-token steps cost prompt + continuation steps each: where the spread would take more than
    `max_tokens` steps, shorter items are taken, and fewer where even the shortest do not fit.
    """
    order = sorted(range(len(items)), key=lambda i: _length(items[i]))
    short = [i for i in order if _length(items[i]) <= max_length]
    pool = short if len(short) >= count else order[:count]
    count = min(count, len(pool))
    while count > 0:
        chosen = [pool[i] for i in np.linspace(0, len(pool) - 1, count).round().astype(int)]
        if sum(_length(items[i]) for i in chosen) <= max_tokens:
            return tuple(chosen)
        if len(pool) > count:
            pool = pool[: max(count, len(pool) * 3 // 4)]
        else:
            count -= 1
            pool = pool[:count]
    return ()


def _length(item: ScoreItem) -> int:
    return len(item.prompt_token_ids) + len(item.continuation)


def _strata(request: TokenRequest) -> Mapping[str, str]:
    tags = {k: request.tags[k] for k in ("case", "task", "language") if k in request.tags}
    return {"prompt_tokens": length_bucket(len(request.prompt_token_ids)), **tags}


def length_bucket(length: int) -> str:
    """The stratum of a prompt of so many tokens, as text."""
    upper = next((edge for edge in LENGTH_EDGES if length < edge), None)
    lower = max((edge for edge in LENGTH_EDGES if length >= edge), default=0)
    return f"{lower}+" if upper is None else f"{lower}-{upper - 1}"
