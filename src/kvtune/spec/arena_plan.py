"""How many blocks of each KV group a budget buys: what engine and simulator build their caches from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtune.config import CacheConfig, format_bytes
from kvtune.errors import UsageError
from kvtune.spec.layout import KVGroup, PackedLayout, codec_storage
from kvtune.spec.model import ModelSpec
from kvtune.spec.pool_budget import PoolBudget
from kvtune.spec.sizing import first_block_bytes, group_block_bytes, split_budget

__all__ = ["FIRST_BLOCK_CODEC", "ArenaPlan", "plan_arenas"]

FIRST_BLOCK_CODEC = "bf16"
"""How block 0 of each sequence is stored with `first_block_16bit`."""

_FIRST_SHARE = 4
"""The 16-bit first blocks take at most 1 / this of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """Blocks per group, in the body and (0 without `first_block_16bit`) in the 16-bit first arena.

    `block_bytes[g]` and `first_block_bytes[g]`: bytes of one block of group g over all its layers.
    `plane_bytes[g]`: the part of `block_bytes[g]` that lies in low planes it may lose while the engine runs;
    `num_resting[g]`: how many blocks' low planes the host arena holds.
    """

    groups: tuple[KVGroup, ...]
    num_blocks: tuple[int, ...]
    num_first_blocks: tuple[int, ...]
    block_bytes: tuple[int, ...]
    first_block_bytes: tuple[int, ...]
    block_size: int
    plane_bytes: tuple[int, ...]
    num_resting: tuple[int, ...]

    @property
    def budgets(self) -> tuple[PoolBudget, ...]:
        """What each group's body may spend: bytes where planes can be dropped, else blocks."""
        return self._budgets(self.num_blocks)

    def _budgets(self, num_blocks: tuple[int, ...]) -> tuple[PoolBudget, ...]:
        rows = zip(num_blocks, self.block_bytes, self.plane_bytes, strict=True)
        return tuple(
            PoolBudget(total=n * size, block=size - plane, plane=plane) if plane else PoolBudget(total=n)
            for n, size, plane in rows
        )

    @property
    def num_ids(self) -> tuple[int, ...]:
        """Ids of body blocks per group: more than `num_blocks` where dropped planes can pay for blocks."""
        return tuple(budget.num_ids for budget in self.budgets)

    @property
    def first_bytes(self) -> int:
        """Bytes of the 16-bit first blocks, which no change of the budget touches."""
        rows = zip(self.num_first_blocks, self.first_block_bytes, strict=True)
        return sum(count * size for count, size in rows)

    def budgets_for(self, kv_budget_bytes: int, *, max_model_len: int, chunk: int) -> tuple[PoolBudget, ...]:
        """The pools' budgets under a lower KV budget; block ids stay.

        UsageError for less than one block of each group.
        """
        if kv_budget_bytes < self.first_bytes + sum(self.block_bytes):
            raise UsageError(
                f"KV budget {format_bytes(kv_budget_bytes)} cannot hold one block of each KV group beside "
                f"{format_bytes(self.first_bytes)} of 16-bit first blocks; give more"
            )
        num_blocks = split_budget(
            self.groups, self.block_bytes, kv_budget_bytes - self.first_bytes, max_model_len=max_model_len,
            chunk=chunk, block_size=self.block_size,
        )  # fmt: skip
        most = self.num_blocks  # rounding may move a block from one group to another
        num_blocks = tuple(min(n, limit) for n, limit in zip(num_blocks, most, strict=True))
        left = kv_budget_bytes - self.first_bytes
        left -= sum(n * size for n, size in zip(num_blocks, self.block_bytes, strict=True))
        return _with_change(self._budgets(num_blocks), self.budgets, left)

    @property
    def total_bytes(self) -> int:
        """Bytes of all arenas, as spec predicts them."""
        rows = zip(self.num_blocks, self.block_bytes, self.num_first_blocks, self.first_block_bytes,
                   strict=True)  # fmt: skip
        return sum(n * size + first * first_size for n, size, first, first_size in rows)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the smallest group with full attention can hold (of all groups if none has)."""
        blocks = [n + first for n, first in zip(self.num_blocks, self.num_first_blocks, strict=True)]
        full = [n for group, n in zip(self.groups, blocks, strict=True) if group.window is None]
        return min(full or blocks) * self.block_size


def plan_arenas(
    spec: ModelSpec, cache: CacheConfig, *, max_model_len: int, max_num_seqs: int, chunk: int
) -> ArenaPlan:
    """Spend the KV budget on blocks. UsageError for an unknown codec or layer and for a budget that
    cannot hold one block of each group. `chunk`: tokens of one sequence computed per step at most."""
    _check_codecs(spec, cache)
    groups = spec.kv_groups()
    block = tuple(group_block_bytes(g, cache.codecs_of, cache.block_size) for g in groups)
    first = tuple(first_block_bytes(g, cache.block_size, FIRST_BLOCK_CODEC) for g in groups)
    planes = tuple(_plane_bytes(g, cache) if cache.squeeze_planes else 0 for g in groups)
    budget = cache.kv_budget_bytes
    num_first = (0,) * len(groups)
    if cache.first_block_16bit:
        # twice the running sequences, so that idle first blocks of cached prefixes survive them
        count = max(1, min(2 * max_num_seqs, budget // _FIRST_SHARE // sum(first)))
        num_first = (count,) * len(groups)
        budget -= count * sum(first)
        if budget < sum(block):
            raise UsageError(f"KV budget {cache.kv_budget} cannot hold a 16-bit first block and one more")
    num_blocks = split_budget(
        groups, block, budget, max_model_len=max_model_len, chunk=chunk,
        block_size=cache.block_size,
    )  # fmt: skip
    return ArenaPlan(
        groups=groups,
        num_blocks=num_blocks,
        num_first_blocks=num_first,
        block_bytes=block,
        first_block_bytes=first,
        block_size=cache.block_size,
        plane_bytes=planes,
        num_resting=_num_resting(cache.plane_arena_bytes, num_blocks, block, planes),
    )


def _with_change(
    budgets: tuple[PoolBudget, ...], most: tuple[PoolBudget, ...], left: int
) -> tuple[PoolBudget, ...]:
    """What is left of a budget, less than a block, to the first group that can use it without its planes."""
    changed: list[PoolBudget] = []
    for budget, limit in zip(budgets, most, strict=True):
        extra = min(left, limit.total - budget.total) if budget.plane else 0
        changed.append(replace(budget, total=budget.total + extra))
        left -= extra
    return tuple(changed)


def _plane_bytes(group: KVGroup, cache: CacheConfig) -> int:
    """Bytes of one block's droppable low planes over the group's layers."""
    total = 0
    for layer in group.layers:
        k_codec, v_codec = cache.codecs_of(layer)
        layout = PackedLayout(
            block_size=cache.block_size, num_kv_heads=group.num_kv_heads, k_head_dim=group.k_head_dim,
            v_head_dim=group.v_head_dim, k_codec=k_codec, v_codec=v_codec,
        )  # fmt: skip
        sizes = {"k": layout.k_low_bytes, "v": layout.v_low_bytes}
        total += sum(sizes[side] for side in cache.droppable_sides(layer))
    return total


def _num_resting(
    arena_bytes: int, num_blocks: tuple[int, ...], block_bytes: tuple[int, ...], plane_bytes: tuple[int, ...]
) -> tuple[int, ...]:
    """The host arena's places, shared out so that each group can drop the same share of its planes; no more
    than there can be blocks once all planes are dropped."""
    everything = sum(n * size for n, size in zip(num_blocks, plane_bytes, strict=True))
    if not everything:
        return (0,) * len(num_blocks)
    return tuple(
        min(n * size // (size - plane), arena_bytes * n // everything) if plane else 0
        for n, size, plane in zip(num_blocks, block_bytes, plane_bytes, strict=True)
    )


def _check_codecs(spec: ModelSpec, cache: CacheConfig) -> None:
    for name in (cache.k_codec, cache.v_codec):
        codec_storage(name)
    for layer, pair in cache.layer_codecs.items():
        for name in pair:
            codec_storage(name)
        if not 0 <= layer < len(spec.layers):
            raise UsageError(
                f"layer_codecs names layer {layer}; the model has layers 0..{len(spec.layers) - 1}"
            )
    for layer in cache.squeeze_planes:
        if not 0 <= layer < len(spec.layers):
            raise UsageError(
                f"squeeze_planes names layer {layer}; the model has layers 0..{len(spec.layers) - 1}"
            )
        for side, name in zip("kv", cache.codecs_of(layer), strict=True):
            if side in cache.droppable_sides(layer) and not codec_storage(name).low_bits:
                raise UsageError(
                    f"squeeze_planes drops a plane of {side} in layer {layer}, which is stored as {name} and "
                    "has no second plane; use n8_rh"
                )
