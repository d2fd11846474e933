"""What block hashes alone can say of broken prefixes: less than text, but some of it for certain.

Two things are sound. Content ids (which name a chunk, not its prefix) that come back behind another prefix
are reuse lost to order. And turns of one session that grow should continue each other: where they part, and
whether always at the same early block, is in the hashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import median_low
from typing import Final

import numpy as np

from kvtune.workload.blocks import BlockTrace
from kvtune.workload.lint.report import Finding, Position
from kvtune.workload.prefix import PrefixTree
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.reuse import is_seen_before

__all__ = ["content_finding", "first_block_note", "session_finding"]

_MAX_SAMPLES: Final = 3
_MIN_TURNS: Final = 20
_SAME_PLACE_SHARE: Final = 0.5
_EARLY_SHARE: Final = 0.25
_ALWAYS_NEW: Final = 0.9


def content_finding(
    requests: Sequence[WorkloadRequest], prompt_tokens: int, *, max_loss: float
) -> tuple[Finding | None, list[str]]:
    """(reuse won if chunks came in a fixed order, those of most requests first; notes). The last chunk, what
    the user asked, stays last. None where ids name prefixes or nothing is won."""
    hashed = [request for request in requests if request.hash_ids and request.hash_lengths]
    if not hashed or not _is_content(hashed):
        return None, []
    uses = Counter(i for request in hashed for i in set(request.hash_ids or ()))
    as_sent, ordered = PrefixTree(), PrefixTree()
    lost: list[tuple[int, WorkloadRequest, int]] = []
    seen: set[int] = set()
    anywhere = 0
    for request in hashed:
        chunks = list(zip(request.hash_ids or (), request.hash_lengths or (), strict=True))
        anywhere += sum(held for i, held in chunks if i in seen)
        seen.update(i for i, _ in chunks)
        hit, at = _hit_tokens(as_sent, chunks, request.cache_salt)
        fixed = [*sorted(chunks[:-1], key=lambda chunk: (-uses[chunk[0]], chunk[0])), chunks[-1]]
        could, _ = _hit_tokens(ordered, fixed, request.cache_salt)
        if could > hit:
            lost.append((could - hit, request, at))
    notes = [
        f"{anywhere / max(1, prompt_tokens):.1%} of the prompt tokens are content seen before at any place: "
        "the most that reuse without regard to position could reach"
    ]
    return _finding("moved_content", lost, prompt_tokens, max_loss), notes


def _is_content(requests: Sequence[WorkloadRequest]) -> bool:
    """Whether an id is seen behind two different ids: ids that name whole prefixes never are."""
    before: dict[int, int] = {}
    for request in requests:
        previous = -1
        for i in request.hash_ids or ():
            if before.setdefault(i, previous) != previous:
                return True
            previous = i
    return False


def _hit_tokens(
    tree: PrefixTree, chunks: Sequence[tuple[int, int]], salt: str
) -> tuple[int, int]:  # fmt: skip
    """(tokens of the longest known prefix, which are also where it ends); the prompt is added."""
    num_known = len(tree)
    units: Sequence[Hashable] = chunks
    hit = 0
    for node, (_, held) in zip(tree.add(units, salt=salt), chunks, strict=True):
        if node >= num_known:
            break
        hit += held
    return hit, hit


def _finding(
    rule: str, lost: Sequence[tuple[int, WorkloadRequest, int]], prompt_tokens: int, max_loss: float
) -> Finding | None:
    """`lost`: (tokens, request, token it breaks at) of each request."""
    total = sum(tokens for tokens, _, _ in lost)
    if not total:
        return None
    share = total / max(1, prompt_tokens)
    worst = sorted(lost, key=lambda entry: -entry[0])[:_MAX_SAMPLES]
    return Finding(
        rule=rule,
        level="error" if share >= max_loss else "note",
        lost_tokens=total,
        lost_share=share,
        num_requests=len(lost),
        position=Position(message=None, role=None, character=None, token=median_low(at for _, _, at in lost)),
        request_ids=tuple((request.request_id, "") for _, request, _ in worst),
    )


def session_finding(
    requests: Sequence[WorkloadRequest], trace: BlockTrace, *, max_loss: float
) -> Finding | None:
    """Growing turns of a session that do not continue what came before. `requests` and `trace` are the same
    requests in the same order. None below 20 turns that could be compared.

    A turn that is shorter than the one before was cut on purpose, and is not counted.
    """
    hits = _ideal_hits(trace)
    counts = np.diff(trace.request_start)
    last: dict[tuple[str, str, str], int] = {}
    lost: list[tuple[int, WorkloadRequest, int]] = []
    num_turns = 0
    for number, request in enumerate(requests):
        if not request.session_id:
            continue
        key = (request.session_id, request.cache_salt, request.tags.get("group", ""))
        before = last.get(key)
        last[key] = number
        if before is None or trace.prompt_tokens[number] < trace.prompt_tokens[before]:
            continue
        num_turns += 1
        # A prompt's last, partial block is another one once the prompt goes on.
        full = int(trace.prompt_tokens[before] // trace.block_size)
        missing = min(full, int(counts[before]), int(counts[number])) - int(hits[number])
        if missing > 0:
            lost.append((missing * trace.block_size, request, int(hits[number]) * trace.block_size))
    if num_turns < _MIN_TURNS:
        return None
    rule = "changing_head" if _is_one_early_place(lost) else "rewritten_history"
    return _finding(rule, lost, int(trace.prompt_tokens.sum()), max_loss)


def _ideal_hits(trace: BlockTrace) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64 [R]: blocks of each request that an endless cache has."""
    totals = np.concatenate([[0], np.cumsum(is_seen_before(trace))])
    return np.diff(totals[trace.request_start])


def _is_one_early_place(lost: Sequence[tuple[int, WorkloadRequest, int]]) -> bool:
    """Whether most turns part at the same place, in the first quarter of what they could share."""
    if not lost:
        return False
    place, count = Counter(at for _, _, at in lost).most_common(1)[0]
    shared = median_low(tokens + at for tokens, _, at in lost)
    return count >= _SAME_PLACE_SHARE * len(lost) and place <= _EARLY_SHARE * shared


def first_block_note(trace: BlockTrace) -> str | None:
    """Where nearly no request shares even its first block, a sentence that says so."""
    starts = trace.request_start[:-1][np.diff(trace.request_start) > 0]
    if len(starts) < _MIN_TURNS:
        return None
    new = float((~is_seen_before(trace)[starts]).mean())
    if new < _ALWAYS_NEW:
        return None
    return (
        f"{new:.0%} of the requests do not even share their first block of {trace.block_size} tokens with an "
        "earlier one: if they have a common system prompt, something in its beginning changes"
    )
