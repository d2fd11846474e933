"""Where the allocator bytes of a sequence come from: what is needed, and what paging adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.spec.engines import AllocatorTerm, Paging, allocator_terms
from kvtune.spec.layout import LayerKind
from kvtune.spec.model import ModelSpec
from kvtune.spec.sizing import KVFormat, logical_bytes

__all__ = ["AllocatorModel", "Breakdown", "GroupBytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBytes:
    """One layer group's allocator bytes at one length, over all ranks; `share` of the whole sequence's."""

    kind: LayerKind
    num_layers: int
    bytes: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """`allocator_bytes` as a sum, over all ranks.

    `logical_bytes`: elements, scales and state of one copy. `replication_bytes`: further copies of KV heads
    and latents on other ranks. `window_slack_bytes`: tokens a step holds beyond a window.
    `rounding_bytes`: the unused rest of blocks. `padding_bytes`: alignment, padding layers, enlarged pages.
    """

    num_tokens: int
    allocator_bytes: int
    logical_bytes: int
    replication_bytes: int
    window_slack_bytes: int
    rounding_bytes: int
    padding_bytes: int
    groups: tuple[GroupBytes, ...]


class AllocatorModel:
    """What one engine's pools hold for a sequence, as a function of its length.

    The terms are worked out once, so that a length costs microseconds. UsageError for impossible settings.
    """

    def __init__(self, spec: ModelSpec, kv: KVFormat, engine: str, paging: Paging) -> None:
        self.terms: Sequence[AllocatorTerm] = allocator_terms(spec, kv, engine, paging)
        """Per layer group, on one rank."""
        self.paging = paging
        self._spec, self._kv = spec, kv

    def bytes(self, num_tokens: int) -> int:
        """Allocator bytes of one sequence at its peak, over all ranks."""
        return self.paging.tp * sum(term.bytes(num_tokens) for term in self.terms)

    def read_bytes(self, num_tokens: int) -> int:
        """Bytes all ranks read to decode one token after `num_tokens`: what queries still see, and state."""
        seen = (term.kept(num_tokens) * term.token_bytes + term.state_bytes for term in self.terms)
        return self.paging.tp * sum(seen)

    def stored_bytes(self, num_tokens: int) -> int:
        """Bytes that bring a sequence back from another tier: the blocks later tokens can see, and state."""
        total = 0
        for term in self.terms:
            blocks = -(-term.kept(num_tokens) // term.block_size) if term.block_bytes else 0
            total += blocks * term.block_bytes + term.fixed_bytes
        return self.paging.tp * total

    def prefix_bytes(self, num_tokens: int) -> int:
        """Bytes a cached prefix takes: whole blocks of every group, those a window has left included, since
        they stay until they are evicted."""
        blocks = ((-(-num_tokens // t.block_size), t.block_bytes) for t in self.terms if t.block_bytes)
        return self.paging.tp * sum(count * size for count, size in blocks)

    def cached_token_bytes(self) -> float:
        """Pool bytes, over all ranks, of a token that every layer keeps."""
        paged = (term for term in self.terms if term.block_bytes)
        return self.paging.tp * sum(term.block_bytes / term.block_size for term in paged)

    def effective_block_size(self) -> int:
        """Tokens of the longest block: what a prefix must fill before any of it can be shared."""
        return max((term.block_size for term in self.terms if term.block_bytes), default=1)

    def breakdown(self, num_tokens: int) -> Breakdown:
        """The allocator bytes of one sequence of `num_tokens` tokens, taken apart."""
        tp, terms = self.paging.tp, self.terms
        total, logical = self.bytes(num_tokens), logical_bytes(self._spec, num_tokens, self._kv)
        needed = tp * sum(t.kept(num_tokens) * t.token_bytes + t.state_bytes for t in terms)
        slack = tp * sum((t.held(num_tokens) - t.kept(num_tokens)) * t.token_bytes for t in terms)
        slots = tp * sum(t.blocks(num_tokens) * t.block_size * t.token_bytes for t in terms)
        held = tp * sum(t.held(num_tokens) * t.token_bytes for t in terms)
        return Breakdown(
            num_tokens=num_tokens,
            allocator_bytes=total,
            logical_bytes=logical,
            replication_bytes=needed - logical,
            window_slack_bytes=slack,
            rounding_bytes=slots - held,
            padding_bytes=total - needed - slack - (slots - held),
            groups=tuple(
                GroupBytes(
                    kind=t.kind, num_layers=t.num_layers, bytes=tp * t.bytes(num_tokens),
                    share=tp * t.bytes(num_tokens) / total if total else 0.0,
                )
                for t in terms
            ),
        )  # fmt: skip
