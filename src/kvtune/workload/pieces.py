"""A prompt as pieces of content, of one size or as the source has them, and their chained digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtune.errors import UsageError
from kvtune.workload.request import WorkloadRequest, transcript

__all__ = ["CHARACTERS_PER_TOKEN", "Encode", "Pieces", "pieces_of"]

CHARACTERS_PER_TOKEN: Final = 4
"""English text under common vocabularies; used only where no tokenizer is at hand."""

_DIGEST_BYTES: Final = 16

Encode = Callable[[WorkloadRequest], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """One prompt as (content, tokens held) pairs, to be read once; `prompt_tokens` may exceed what they
    hold."""

    contents: Iterator[tuple[bytes, int]]
    prompt_tokens: int
    is_estimated: bool = False

    def digests(self, cache_salt: str, *, key: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """(digest of the whole prefix up to a piece's end, tokens held): a BLAKE2b chain below the salt.
        `key`, of up to 64 bytes: without it nobody can check a guess of the content."""
        digest = _digest(cache_salt.encode("utf-8", "surrogatepass"), key)
        for content, held in self.contents:
            digest = _digest(content, digest)
            yield digest, held


def _digest(content: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(content, key=key, digest_size=_DIGEST_BYTES).digest()


def pieces_of(
    request: WorkloadRequest, number: int, size: int, *, hash_size: int | None, encode: Encode | None = None
) -> Pieces:
    """Cut a prompt into pieces: text and tokens at `size` tokens, hash ids as they are (`hash_size` tokens
    each, where they have no lengths of their own).

    A prompt of which only the length is known has pieces that no other `number` has. Raises UsageError for
    hash ids without any size.
    """
    if request.token_ids is not None:
        return _of_tokens(request.token_ids, size)
    if request.has_text:
        return _of_text(request, size) if encode is None else _of_tokens(encode(request), size)
    if request.hash_ids is not None:
        return _of_hashes(request, hash_size)
    length = max(0, request.input_length or 0)
    own = b"only" + number.to_bytes(8, "little")
    return Pieces(((own, min(size, length - at)) for at in range(0, length, size)), length)


def _of_tokens(ids: Sequence[int], size: int) -> Pieces:
    data = np.asarray(ids, dtype=np.int64).tobytes()
    step = 8 * size
    return Pieces(
        ((data[at : at + step], min(step, len(data) - at) // 8) for at in range(0, len(data), step)), len(ids)
    )


def _of_text(request: WorkloadRequest, size: int) -> Pieces:
    text = transcript(request)
    step = CHARACTERS_PER_TOKEN * size
    cuts = (text[at : at + step] for at in range(0, len(text), step))
    contents = ((cut.encode("utf-8", "surrogatepass"), -(-len(cut) // CHARACTERS_PER_TOKEN)) for cut in cuts)
    return Pieces(contents, -(-len(text) // CHARACTERS_PER_TOKEN), is_estimated=True)


def _of_hashes(request: WorkloadRequest, hash_size: int | None) -> Pieces:
    ids = request.hash_ids or ()
    length = request.input_length or 0
    if request.hash_lengths is not None:
        lengths: Sequence[int] = request.hash_lengths
        if len(lengths) != len(ids):
            raise UsageError(
                f"request {request.request_id!a} has {len(ids)} hash ids and {len(lengths)} hash_lengths; "
                "give one length for each id"
            )
    elif hash_size is not None:
        lengths = [max(0, min(hash_size, length - at)) for at in range(0, len(ids) * hash_size, hash_size)]
    else:
        raise UsageError("a workload with hash ids needs a block_size: how many tokens one id stands for")
    # Chunks of one id and two lengths would break the cut, so the length is part of the content.
    contents = ((b"%d:%d" % (i, held), held) for i, held in zip(ids, lengths, strict=True) if held)
    return Pieces(contents, max(length, sum(lengths)))
