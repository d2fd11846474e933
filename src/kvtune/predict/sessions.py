"""Which conversation a request belongs to where nobody says: what its prefix shows, learned online."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from kvtune.errors import UsageError

__all__ = ["PrefixSessions", "PrefixView"]

_MAX_CONTINUATIONS: Final = 8
"""A block with more different successors is a system prompt's, not a conversation's."""


@dataclass(frozen=True, slots=True)
class PrefixView:
    """`session`: a name shared by requests of one conversation, None when the prompt has no full block;
    `num_known`: leading blocks that earlier requests brought."""

    session: Hashable | None
    num_known: int


class PrefixSessions:
    """Names conversations by the first block that is theirs alone: the first one not followed by more than
    eight different blocks. Only the past is looked at. Not thread-safe; at most `max_blocks` blocks are
    remembered, those longest unseen leave.
    """

    def __init__(self, *, max_blocks: int = 1 << 18) -> None:
        if max_blocks < 1:
            raise UsageError(f"max_blocks must be at least 1, found {max_blocks}")
        self._max_blocks = max_blocks
        self._successors: OrderedDict[Hashable, tuple[Hashable, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._successors)

    def look(self, block_hashes: Sequence[Hashable]) -> PrefixView:
        """What earlier prompts say about this one; changes nothing.

        `block_hashes`: one identity per leading full block, each naming its whole prefix.
        """
        known = 0
        for block_hash in block_hashes:
            if block_hash not in self._successors:
                break
            known += 1
        own = next((h for h in block_hashes if not self._is_common(h)), None)
        return PrefixView(own, known)

    def add(self, block_hashes: Sequence[Hashable]) -> None:
        """Remember a prompt."""
        for block_hash, successor in itertools.zip_longest(block_hashes, block_hashes[1:]):
            seen = self._successors.get(block_hash, ())
            if successor is not None and successor not in seen and len(seen) <= _MAX_CONTINUATIONS:
                seen = (*seen, successor)
            self._successors[block_hash] = seen
            self._successors.move_to_end(block_hash)
        while len(self._successors) > self._max_blocks:
            self._successors.popitem(last=False)

    def _is_common(self, block_hash: Hashable) -> bool:
        return len(self._successors.get(block_hash, ())) > _MAX_CONTINUATIONS
