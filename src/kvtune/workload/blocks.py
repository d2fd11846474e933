"""A workload as arrays of block references: the form replay and reuse statistics work on.

A block is identified by its whole prefix, so equal ids mean: same tokens at the same place after the same
tokens. Any block size can be asked for. Text and token ids are cut at that size; block hashes of another
size, and content chunks of uneven length, are re-cut: see `block_trace` for what that keeps.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.workload.pieces import CHARACTERS_PER_TOKEN, Encode, pieces_of
from kvtune.workload.request import Workload, WorkloadRequest

__all__ = ["CHARACTERS_PER_TOKEN", "DEFAULT_BLOCK_SIZE", "BlockTrace", "block_trace", "class_of", "tenant_of"]

DEFAULT_BLOCK_SIZE: Final = 16
_MAX_REFERENCES: Final = 200_000_000
_CHUNK_REFERENCES: Final = 1 << 20

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BlockTrace:
    """R requests in arrival order (ties in file order) and the N blocks their prompts consist of.

    `block_ids` int64 [N], dense in order of first appearance; `request_start` int64 [R + 1]: request r
    holds references request_start[r] to request_start[r + 1]; `block_tokens` int32 [N], the tokens each
    reference holds (the last block of a request: the remainder); `arrival_s` float64 [R] from 0;
    `tenant` int32 [R] into `tenants`; `request_class` int32 [R] into `classes`; `session` int32 [R], -1
    where the file names none; `prompt_tokens` int64 [R], which exceeds the sum of a request's blocks where
    the trace gives no identity to the tokens at its end (they are never cached).

    `is_lower_bound`: prompts may share more than the ids show, so hit rates are lower bounds.
    `is_estimated`: tokens were estimated from characters. `notes` say why, in sentences.
    """

    block_ids: IntArray
    request_start: IntArray
    block_tokens: npt.NDArray[np.int32]
    arrival_s: npt.NDArray[np.float64]
    tenant: npt.NDArray[np.int32]
    block_size: int
    num_unique: int
    prompt_tokens: IntArray
    session: npt.NDArray[np.int32]
    request_class: npt.NDArray[np.int32]
    tenants: tuple[str, ...] = ("",)
    classes: tuple[str, ...] = ("",)
    is_lower_bound: bool = False
    is_estimated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_requests(self) -> int:
        return len(self.request_start) - 1

    @property
    def num_references(self) -> int:
        return len(self.block_ids)

    def request_of_reference(self) -> IntArray:
        """int64 [N]: the request each reference belongs to."""
        return np.repeat(np.arange(self.num_requests), np.diff(self.request_start))


def block_trace(
    workload: Workload, block_size: int | None = None, *, encode: Encode | None = None
) -> BlockTrace:
    """Cut a workload's prompts into blocks of `block_size` tokens.

    Without `block_size` hash traces keep their own blocks (or chunks), everything else is cut at 16.
    `encode` gives the token ids of a request with text; without it a token is taken for 4 characters and
    the result says `is_estimated`.

    Traces of block hashes are re-cut honestly. A new block is known to be shared when the recorded block
    that holds its last token is shared. Where two prompts part inside a recorded block the trace does not
    tell the place, so the blocks before it count as different: hits are a lower bound (`is_lower_bound`)
    unless the new size is a multiple of the recorded one.

    Requests of which only the length is known get blocks of their own, shared with nobody. Raises
    UsageError for a block size below 1, for a workload without any prompt content, and beyond 200 million
    references.
    """
    if block_size is not None and block_size < 1:
        raise UsageError(f"the block size must be at least 1 token, found {block_size}")
    if not any(has_content(request) for request in workload.requests):
        raise UsageError(
            f"{workload.path or 'this workload'} holds lengths only, so nothing tells which prompts share a "
            "prefix; replay needs text, token ids or block hashes"
        )
    is_uneven = any(request.hash_lengths is not None for request in workload.requests)
    size = block_size or workload.block_size or (0 if is_uneven else DEFAULT_BLOCK_SIZE)
    segments = _segments(workload, size or DEFAULT_BLOCK_SIZE, encode)
    notes: list[str] = []
    is_lower_bound = False
    if size and not segments.is_cut_at(size):
        is_lower_bound = is_uneven or workload.block_size is None or size % workload.block_size != 0
        notes.append(_recut_note(workload, size, is_uneven=is_uneven, is_lower_bound=is_lower_bound))
        segments = _recut(segments, size)
    elif not size:
        size = int(segments.tokens.max())
        notes.append(f"blocks are the publisher's content chunks, of up to {size} tokens")
    if segments.is_estimated:
        notes.append(f"no tokenizer at hand: tokens are estimated as {CHARACTERS_PER_TOKEN} characters each")
    return _assemble(workload, segments, size, is_lower_bound=is_lower_bound, notes=notes)


def has_content(request: WorkloadRequest) -> bool:
    """Whether more than its length is known of a prompt."""
    return request.token_ids is not None or request.has_text or request.hash_ids is not None


@dataclass(frozen=True, slots=True, eq=False)
class _Segments:
    """Prompts as runs of tokens of known identity, in whatever size the source has.

    `ids` [N] identify the whole prefix up to the segment's end, dense from 0; `covered` [R] is the sum of
    a request's segment tokens, at most `prompt` [R].
    """

    ids: IntArray
    start: IntArray
    tokens: IntArray
    prompt: IntArray
    num_unique: int
    is_estimated: bool = False

    @property
    def covered(self) -> IntArray:
        ends = np.concatenate([[0], np.cumsum(self.tokens)])
        return np.diff(ends[self.start])

    def is_cut_at(self, size: int) -> bool:
        """Whether every segment holds `size` tokens but a request's last, which may hold fewer."""
        is_last = np.zeros(len(self.ids), dtype=bool)
        is_last[self.start[1:][np.diff(self.start) > 0] - 1] = True
        return bool((self.tokens[~is_last] == size).all() and (self.tokens <= size).all())


def _segments(workload: Workload, size: int, encode: Encode | None) -> _Segments:
    requests = workload.requests
    has_text = any(request.has_text or request.token_ids is not None for request in requests)
    if not has_text and workload.block_size is not None:
        found = _hashed_segments(requests, workload.block_size)
        if found is not None:
            return found
    return _chained_segments(workload, size, encode)


def _hashed_segments(requests: Sequence[WorkloadRequest], size: int) -> _Segments | None:
    """The fast path: hash ids that already name whole prefixes, as Mooncake's do. None where they do not
    (one id seen after two different parents), or where a request has no ids at all."""
    counts = [-1 if r.hash_ids is None else len(r.hash_ids) for r in requests]
    if min(counts) < 0 or any(r.hash_lengths is not None for r in requests):
        return None
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    raw = np.empty(int(start[-1]), dtype=np.int64)
    for request, low, high in zip(requests, start[:-1].tolist(), start[1:].tolist(), strict=True):
        raw[low:high] = request.hash_ids or ()
    ids, num_unique = _densify(raw)
    parents = np.concatenate([[-1], ids[:-1]])
    salts, _ = _labels(request.cache_salt for request in requests)
    is_filled = np.diff(start) > 0
    parents[start[:-1][is_filled]] = -1 - salts[is_filled]
    first_parent = np.empty(num_unique, dtype=np.int64)
    first_parent[ids] = parents
    if not np.array_equal(first_parent[ids], parents):
        return None
    prompt = np.asarray([r.input_length or 0 for r in requests], dtype=np.int64)
    tokens = np.full(len(ids), size, dtype=np.int64)
    last = prompt - (np.diff(start) - 1) * size  # tokens the last block holds, more than a block if ids stop
    if (last[is_filled] < 1).any():
        bad = requests[int(np.flatnonzero(is_filled & (last < 1))[0])]
        raise UsageError(
            f"request {bad.request_id!a} has {len(bad.hash_ids or ())} block hashes of {size} tokens for "
            f"{bad.input_length} prompt tokens; say the block size with --trace-block-size"
        )
    tokens[start[1:][is_filled] - 1] = np.minimum(last[is_filled], size)
    return _Segments(ids, start, tokens, prompt, num_unique)


def _chained_segments(workload: Workload, size: int, encode: Encode | None) -> _Segments:
    """The general path: a segment's identity is a digest over its parent's digest and its own content."""
    known: dict[bytes, int] = {}
    ids, tokens = array("q"), array("q")
    start, prompt = array("q", [0]), array("q")
    is_estimated = False
    for number, request in enumerate(workload.requests):
        pieces = pieces_of(request, number, size, hash_size=workload.block_size, encode=encode)
        is_estimated |= pieces.is_estimated
        _check_references(len(ids) + pieces.prompt_tokens // size, size)
        for digest, held in pieces.digests(request.cache_salt):
            ids.append(known.setdefault(digest, len(known)))
            tokens.append(held)
        start.append(len(ids))
        prompt.append(pieces.prompt_tokens)
    return _Segments(
        ids=np.asarray(ids, dtype=np.int64),
        start=np.asarray(start, dtype=np.int64),
        tokens=np.asarray(tokens, dtype=np.int64),
        prompt=np.asarray(prompt, dtype=np.int64),
        num_unique=len(known),
        is_estimated=is_estimated,
    )


def _check_references(total: int, size: int) -> None:
    if total > _MAX_REFERENCES:
        raise UsageError(
            f"blocks of {size} tokens make {total:,} references of this trace, more than "
            f"{_MAX_REFERENCES:,}; use a larger block size or a part of the trace"
        )


def _recut(source: _Segments, size: int) -> _Segments:
    """The same prompts in blocks of `size` tokens. A new block that ends `o` tokens into a recorded one is
    named by (that one's whole prefix, o); a block that reaches into tokens of unknown identity is left out.
    """
    covered = source.covered
    counts = np.where(covered == source.prompt, -(-covered // size), covered // size)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(start[-1])
    _check_references(total, size)
    name_ends = _FullBlockNames.of(source, covered, size)
    ids = np.empty(total, dtype=np.int64)
    tokens = np.full(total, size, dtype=np.int64)
    # In runs of requests: the temporary arrays would be several times the result.
    breaks = np.searchsorted(start, np.arange(0, total, _CHUNK_REFERENCES), side="left")
    bounds = np.unique(np.concatenate([breaks, [0, len(covered)]])).tolist()
    for low, high in itertools.pairwise(bounds):
        part = np.arange(int(start[low]), int(start[high]))
        request = np.repeat(np.arange(low, high), counts[low:high])
        ids[part] = name_ends(request, np.minimum((part - start[request] + 1) * size, covered[request]))
    # A prompt's last, partial block has a name of its own: the segment it ends in, and where.
    is_partial = (covered == source.prompt) & (covered % size != 0)
    last = start[1:][is_partial] - 1
    tokens[last] = covered[is_partial] % size
    ends_in = source.ids[source.start[1:][is_partial] - 1]
    _, names = np.unique(np.stack([ends_in, covered[is_partial]]), axis=1, return_inverse=True)
    ids[last] = name_ends.num_names + names.reshape(-1)
    dense, num_unique = _densify(ids)
    return _Segments(dense, start, tokens, source.prompt, num_unique, source.is_estimated)


@dataclass(frozen=True, slots=True, eq=False)
class _FullBlockNames:
    """Numbers full blocks of `size` tokens by the place they end at: one number for each multiple of `size`
    that lies in a segment, the same for all prompts that share the segment."""

    segments: _Segments
    size: int
    request_begin: IntArray
    """[R] tokens of the trace before the request's first."""
    segment_end: IntArray
    """[N] tokens of the trace up to the segment's last."""
    base: IntArray
    """[num_unique] what to add to a block's index to get its number."""
    num_names: int

    @classmethod
    def of(cls, segments: _Segments, covered: IntArray, size: int) -> _FullBlockNames:
        request_begin = np.concatenate([[0], np.cumsum(covered)])[:-1]
        ends = np.cumsum(segments.tokens)
        stops = ends - np.repeat(request_begin, np.diff(segments.start))
        low = np.zeros(segments.num_unique, dtype=np.int64)
        high = np.zeros(segments.num_unique, dtype=np.int64)
        low[segments.ids] = (stops - segments.tokens) // size
        np.maximum.at(high, segments.ids, stops // size)
        first = np.concatenate([[0], np.cumsum(high - low)])
        return cls(segments, size, request_begin, ends, first[:-1] - low, int(first[-1]))

    def __call__(self, request: IntArray, end: IntArray) -> IntArray:
        """The number of the block of each request that ends `end` tokens after its beginning."""
        place = np.searchsorted(self.segment_end, self.request_begin[request] + end, side="left")
        return self.base[self.segments.ids[place]] + -(-end // self.size) - 1


def _densify(raw: IntArray) -> tuple[IntArray, int]:
    """Renumber from 0 in order of first appearance."""
    if not len(raw):
        return raw, 0
    low, high = int(raw.min()), int(raw.max())
    if high - low <= 4 * len(raw):
        raw, num_values = raw - low, high - low + 1
    else:
        values, raw = np.unique(raw, return_inverse=True)
        num_values = len(values)
    first = np.full(num_values, len(raw), dtype=np.int64)
    first[raw[::-1]] = np.arange(len(raw) - 1, -1, -1)  # of equal indices the last assignment stays
    order = np.argsort(first, kind="stable")
    num_unique = int(np.searchsorted(first[order], len(raw)))
    rank = np.empty(num_values, dtype=np.int64)
    rank[order] = np.arange(num_values)
    return rank[raw], num_unique


def _recut_note(workload: Workload, size: int, *, is_uneven: bool, is_lower_bound: bool) -> str:
    recorded = "content chunks of uneven length" if is_uneven else f"blocks of {workload.block_size} tokens"
    note = f"{recorded} re-cut to blocks of {size}"
    if not is_lower_bound:
        return f"{note}: exact"
    return (
        f"{note}: hit rates are lower bounds, since the trace does not say where inside one two prompts part"
    )


def _labels(names: Iterable[str]) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """(number of each name, the names in order of first appearance)."""
    known: dict[str, int] = {}
    numbers = np.asarray([known.setdefault(name, len(known)) for name in names], dtype=np.int32)
    return numbers, tuple(known)


def _assemble(
    workload: Workload, segments: _Segments, size: int, *, is_lower_bound: bool, notes: Sequence[str]
) -> BlockTrace:
    requests = workload.requests
    tenant, tenants = _labels(tenant_of(request) for request in requests)
    kind, classes = _labels(class_of(request) for request in requests)
    session, names = _labels(request.session_id for request in requests)
    if "" in names:
        session[session == names.index("")] = -1
    arrivals = np.asarray([request.arrival_s for request in requests], dtype=np.float64)
    return BlockTrace(
        block_ids=segments.ids,
        request_start=segments.start,
        block_tokens=segments.tokens.astype(np.int32),
        arrival_s=arrivals,
        tenant=tenant,
        block_size=size,
        num_unique=segments.num_unique,
        prompt_tokens=segments.prompt,
        session=session,
        request_class=kind,
        tenants=tenants,
        classes=classes,
        is_lower_bound=is_lower_bound,
        is_estimated=segments.is_estimated,
        notes=tuple(notes),
    )


def tenant_of(request: WorkloadRequest) -> str:
    """Who is asking: the tag `tenant`, `client` or `user`, else the cache salt; "" where none is known."""
    tags = request.tags
    return next((tags[name] for name in ("tenant", "client", "user") if name in tags), request.cache_salt)


def class_of(request: WorkloadRequest) -> str:
    """What kind of request it is: the tag `class`, `kind`, `case`, `task` or `model`; "" where none is."""
    tags = request.tags
    return next((tags[name] for name in ("class", "kind", "case", "task", "model") if name in tags), "")
