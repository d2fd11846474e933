"""A workload without its text: salted hashes in place of content and names, and the same block reuse.

What stays: arrival times, numbers of tokens, which prompts share which prefix, which requests belong to one
session, tenant or class. What goes: every text, token id, name, path and fingerprint of the source. Without
the salt no guess of a prompt can be checked against the file; with the same salt two files can be joined.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Final

from kvtune.errors import InvariantError, UsageError
from kvtune.workload.blocks import DEFAULT_BLOCK_SIZE, has_content
from kvtune.workload.pieces import CHARACTERS_PER_TOKEN, Encode, pieces_of
from kvtune.workload.request import Workload, WorkloadRequest

__all__ = ["MIN_SALT_BYTES", "anonymise"]

MIN_SALT_BYTES: Final = 16
_MAX_KEY_BYTES: Final = 64
_NAMED_TAGS: Final = frozenset(
    ("tenant", "client", "user", "class", "kind", "case", "task", "model", "group", "language")
)
"""Tags that replay and statistics group by; their values become pseudonyms, other tags go."""


def anonymise(
    workload: Workload, *, salt: bytes, block_size: int | None = None, encode: Encode | None = None
) -> Workload:
    """The workload with block hashes for prompts, pseudonyms for names, and nothing else that was text.

    `salt`: at least 16 secret bytes. `block_size`: tokens per block of text and token ids (16 by default);
    hash traces keep theirs. Cut into blocks of that size, the result has the same references as the original.

    Raises UsageError for a short salt and for another block size than a hash trace has.
    """
    if len(salt) < MIN_SALT_BYTES:
        raise UsageError(f"the salt must have at least {MIN_SALT_BYTES} bytes, found {len(salt)}")
    if block_size is not None and block_size < 1:
        raise UsageError(f"the block size must be at least 1 token, found {block_size}")
    hidden = _Hidden(salt, _size(workload, block_size), workload.block_size, encode)
    requests = [hidden.request(number, request) for number, request in enumerate(workload.requests)]
    hidden.check()
    is_hashed = any(request.hash_ids is not None for request in requests)
    if is_hashed and hidden.is_even:
        requests = [dataclasses.replace(request, hash_lengths=None) for request in requests]
    notes = ["anonymised: block hashes and pseudonyms are salted, there is no text"]
    if hidden.is_estimated:
        notes.append(f"lengths were estimated as {CHARACTERS_PER_TOKEN} characters per token")
    return Workload(
        requests=tuple(requests),
        format=workload.format,
        notes=tuple(notes),
        is_synthetic_text=True,
        block_size=hidden.size if is_hashed and hidden.is_even else None,
    )


def _size(workload: Workload, asked: int | None) -> int:
    own = workload.block_size
    if own is not None and asked not in (None, own):
        raise UsageError(f"this trace has blocks of {own} tokens, which cannot be cut at {asked}")
    return own or asked or DEFAULT_BLOCK_SIZE


class _Hidden:
    """Makes the hashes and pseudonyms of one workload."""

    def __init__(self, salt: bytes, size: int, hash_size: int | None, encode: Encode | None) -> None:
        self.size = size
        self.is_even = True  # all pieces hold `size` tokens but a prompt's last
        self.is_estimated = False
        self._key = hashlib.blake2b(salt, digest_size=_MAX_KEY_BYTES, person=b"kvtune-anonym").digest()
        self._hash_size = hash_size
        self._encode = encode
        self._digest_of: dict[int, bytes] = {}
        self._has_collision = False

    def request(self, number: int, request: WorkloadRequest) -> WorkloadRequest:
        pieces = pieces_of(request, number, self.size, hash_size=self._hash_size, encode=self._encode)
        self.is_estimated |= pieces.is_estimated
        ids: list[int] = []
        lengths: list[int] = []
        if has_content(request):
            for digest, held in pieces.digests(request.cache_salt, key=self._key):
                ids.append(self._id(digest))
                lengths.append(held)
            self.is_even &= all(held == self.size for held in lengths[:-1]) and lengths[-1:] <= [self.size]
        return WorkloadRequest(
            request_id=f"request-{number}",
            arrival_s=request.arrival_s,
            hash_ids=tuple(ids) if has_content(request) else None,
            hash_lengths=tuple(lengths) if has_content(request) else None,
            input_length=pieces.prompt_tokens,
            output_length=_output_length(request),
            max_tokens=request.max_tokens,
            session_id=self._name("session", request.session_id),
            cache_salt=self._name("salt", request.cache_salt),
            priority=request.priority,
            tags=self._tags(request.tags),
        )

    def check(self) -> None:
        """Raises InvariantError where two prefixes got one id: chances are below one in ten million for
        the largest traces that can be read."""
        if self._has_collision:
            raise InvariantError("two prefixes got the same hash; anonymise again with another salt")

    def _id(self, digest: bytes) -> int:
        short = int.from_bytes(digest[:8], "little") >> 1  # below 2^63, as readers of int64 want it
        self._has_collision |= self._digest_of.setdefault(short, digest) != digest
        return short

    def _name(self, kind: str, name: str) -> str:
        """A pseudonym; nothing stays nothing."""
        if not name:
            return ""
        text = f"{kind}:{name}".encode("utf-8", "surrogatepass")
        return f"{kind}-{hashlib.blake2b(text, key=self._key, digest_size=8).hexdigest()}"

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {name: self._name(name, value) for name, value in tags.items() if name in _NAMED_TAGS}


def _output_length(request: WorkloadRequest) -> int | None:
    if request.output_length is not None or request.answer is None:
        return request.output_length
    return -(-len(request.answer) // CHARACTERS_PER_TOKEN)
