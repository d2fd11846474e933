"""Faults planted into a running engine's KV cache reads, to show that tests and gates notice them.

    with planted(engine, ZeroKeys(layer=2, beyond=1024)):
        engine.generate(...)        # layer 2 sees zero keys from position 1024 on
    engine.generate(...)            # as before, bit for bit

A damage is a pure function of what a layer reads: the decoded keys and values of positions 0..n-1 and their
positions. It never depends on how a prompt was cut into steps, so prefill, decode and prefix hits all see the
same damaged cache, and the arenas of the damaged layer keep the undamaged bytes. Layers above write what they
compute from damaged reads; `planted` therefore forgets cached prefixes when it begins and when it ends.

A damaged layer's `attend` is replaced: it gathers, damages and attends over a float32 copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from kvtune.codecs import write_kv
from kvtune.engine import Engine
from kvtune.engine.target import EngineTarget, RunningEngine
from kvtune.errors import UsageError
from kvtune.kernels import AttentionBatch, Backend, LayerCache, gather_kv, paged_attention
from kvtune.spec import LayerSpec, ModelSpec
from kvtune.target import Config

__all__ = [
    "DAMAGES",
    "Damage",
    "DamagedTarget",
    "Noise",
    "RoundKeys",
    "ShuffleValues",
    "ZeroKeys",
    "planted",
]

Read = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(k, v), float32 [n, h, d] at positions 0..n-1 (the function's to change) -> what attention sees."""

_TILE = 256
"""Positions drawn at a time: a draw at one position never depends on how long the sequence is."""
_SIDES: Final = ("k", "v")


class Damage(ABC):
    """What goes wrong. Immutable; `layers` are the damaged layers of a model."""

    @abstractmethod
    def layers(self, spec: ModelSpec) -> tuple[int, ...]:
        """UsageError where the model has no such layer or head."""

    @abstractmethod
    def read(self, layer: int, spec: LayerSpec) -> Read:
        """The damage of one layer. What it keeps between calls is drawn from its seed alone."""


@dataclass(frozen=True, kw_only=True)
class ZeroKeys(Damage):
    """Keys of one layer are zero from position `beyond` on: those tokens get equal, meaningless scores."""

    layer: int
    beyond: int = 1024

    def __post_init__(self) -> None:
        if self.beyond < 0:
            raise UsageError(f"beyond must be a position, found {self.beyond}")

    def layers(self, spec: ModelSpec) -> tuple[int, ...]:
        return _chosen(spec, (self.layer,))

    def read(self, layer: int, spec: LayerSpec) -> Read:
        def zero(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            k[self.beyond :] = 0
            return k, v

        return zero


@dataclass(frozen=True, kw_only=True)
class ShuffleValues(Damage):
    """Values of one KV head of one layer come from wrong tokens: position j reads the value of a position
    drawn uniformly from 0..j.

    Not a permutation: the only one that shows no token a value of its future, at every length, is the
    identity. The layer must keep its whole context (no window), else what it reads would depend on what the
    cache still happens to hold.
    """

    layer: int
    head: int
    seed: int = 0

    def layers(self, spec: ModelSpec) -> tuple[int, ...]:
        chosen = _chosen(spec, (self.layer,))
        layer = spec.layers[self.layer]
        if not 0 <= self.head < layer.num_kv_heads:
            raise UsageError(
                f"layer {self.layer} has KV heads 0..{layer.num_kv_heads - 1}, asked for head {self.head}"
            )
        if layer.window is not None:
            raise UsageError(
                f"layer {self.layer} attends within a window of {layer.window} tokens; shuffle the values of "
                "a full_attention layer"
            )
        return chosen

    def read(self, layer: int, spec: LayerSpec) -> Read:
        drawn = _Tiles(lambda rng: rng.random(_TILE), (self.seed, layer))

        def shuffle(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            positions = torch.arange(len(v), dtype=torch.float64)
            source = (drawn.first(len(v)) * (positions + 1)).long()
            v[:, self.head] = v[source, self.head]
            return k, v

        return shuffle


@dataclass(frozen=True, kw_only=True)
class RoundKeys(Damage):
    """Keys rounded to `bits` bits as the int4 codec would: one fp16 scale and minimum per token and head.

    `choice`: damaged layers, None for all.
    """

    bits: int = 2
    choice: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits must lie in 1..8, found {self.bits}")

    def layers(self, spec: ModelSpec) -> tuple[int, ...]:
        return _chosen(spec, self.choice)

    def read(self, layer: int, spec: LayerSpec) -> Read:
        top = 2**self.bits - 1

        def round_keys(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
            scale = ((high - low) / top).half().float()
            low = low.half().float()
            codes = ((k - low) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, top)
            return low + scale * codes, v

        return round_keys


@dataclass(frozen=True, kw_only=True)
class Noise(Damage):
    """Gaussian noise on keys and values, its deviation `strength` times each vector's root mean square.

    Divergence grows about as strength squared, so a strength for a wanted KL is found in a few replays.
    The draw depends on seed, layer, side and position. `choice`: damaged layers, None for all. `sides`: k, v
    or both.
    """

    strength: float
    sides: tuple[str, ...] = _SIDES
    choice: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise UsageError(f"strength must be finite and at least 0, found {self.strength}")
        unknown = sorted(set(self.sides) - set(_SIDES))
        if unknown or not self.sides:
            raise UsageError(f"sides are k and v, found {self.sides!r}")

    def layers(self, spec: ModelSpec) -> tuple[int, ...]:
        return _chosen(spec, self.choice)

    def read(self, layer: int, spec: LayerSpec) -> Read:
        dims = {"k": spec.k_head_dim, "v": spec.v_head_dim}
        tiles = {
            side: _Tiles(
                _normal((_TILE, spec.num_kv_heads, dims[side])), (self.seed, layer, _SIDES.index(side))
            )
            for side in self.sides
        }

        def disturb(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            read = {"k": k, "v": v}
            for side, drawn in tiles.items():
                x = read[side]
                size = self.strength * x.square().mean(-1, keepdim=True).sqrt()
                read[side] = x + size * drawn.first(len(x))
            return read["k"], read["v"]

        return disturb


DAMAGES: Final[Mapping[str, type[Damage]]] = MappingProxyType(
    {"zero_keys": ZeroKeys, "shuffle_values": ShuffleValues, "round_keys": RoundKeys, "noise": Noise}
)


@contextmanager
def planted(engine: Engine | RunningEngine, *damages: Damage) -> Generator[None]:
    """Damage what this engine reads, in the order given, while the context lasts.

    Engines that share the loaded model are untouched. UsageError for an impossible layer or head, and for an
    engine with unfinished requests at either end: their blocks would mix damaged and sound values.
    """
    engine = engine.engine if isinstance(engine, RunningEngine) else engine
    reads: dict[int, list[Read]] = {}
    for damage in damages:
        for index in damage.layers(engine.loaded.spec):
            reads.setdefault(index, []).append(damage.read(index, engine.loaded.spec.layers[index]))
    _check_idle(engine, "planting damage")
    with ExitStack() as undo:
        for index, new in reads.items():
            layer = engine.attention_layers[index]
            undo.callback(setattr, layer, "attend", layer.attend)
            earlier = layer.attend.reads if isinstance(layer.attend, _DamagedAttention) else ()
            layer.attend = _DamagedAttention((*earlier, *new))
        undo.callback(engine.reset_prefix_cache)
        engine.reset_prefix_cache()
        yield
    _check_idle(engine, "removing damage")


class DamagedTarget(EngineTarget):
    """Our engine as a tuning target whose engines start with damages planted, where `when(config)` says so.

    Stands in for a configuration that harms answers: the gate must fail what this target starts.
    """

    def __init__(
        self, *args: Any, damages: tuple[Damage, ...], when: Callable[[Config], bool] = lambda _: True,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **settings)
        self._damages = damages
        self._when = when

    def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> RunningEngine:
        running = super().start(config, kv_budget_bytes=kv_budget_bytes)
        if not self._when(config):
            return running
        return _DamagedEngine(running.engine, self._damages, clock=self._clock, sleep=self._sleep)


class _DamagedEngine(RunningEngine):
    """Damaged from start to close."""

    def __init__(
        self, engine: Engine, damages: tuple[Damage, ...], *, clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:  # fmt: skip
        super().__init__(engine, clock=clock, sleep=sleep)
        self._planted = ExitStack()
        try:
            self._planted.enter_context(planted(engine, *damages))
        except UsageError:
            engine.close()
            raise

    def close(self) -> None:
        super().close()
        self._planted.close()


class _DamagedAttention:
    """Stands where a layer has `paged_attention`: attends over a damaged float32 copy of what it reads."""

    def __init__(self, reads: tuple[Read, ...]) -> None:
        self.reads = reads

    def __call__(
        self, q: torch.Tensor, cache: LayerCache, batch: AttentionBatch, *, backend: Backend, **masking: Any
    ) -> torch.Tensor:
        copy, table = self._damaged_copy(cache, batch, backend)
        return paged_attention(q, copy, replace(batch, block_table=table), backend=backend, **masking)

    def _damaged_copy(
        self, cache: LayerCache, batch: AttentionBatch, backend: Backend
    ) -> tuple[LayerCache, torch.Tensor]:
        """A float32 cache of what each sequence reads, its blocks in order, and its block table.

        Blocks that left a window (-1) read as zeros and stay masked.
        """
        size = cache.layout.block_size
        counts = [-(-length // size) for length in batch.context_len.tolist()]
        copy = LayerCache.allocate(replace(cache.layout, k_codec="fp32", v_codec="fp32"), max(sum(counts), 1))
        table = torch.full_like(batch.block_table, -1)
        first = 0
        for row, (count, length) in enumerate(zip(counts, batch.context_len.tolist(), strict=True)):
            k, v = gather_kv(cache, batch.block_table[row, :count], length, backend=backend)
            for read in self.reads:
                k, v = read(k, v)
            write_kv(copy, k, v, first * size + torch.arange(length), backend=backend)
            table[row, :count] = torch.arange(first, first + count, dtype=table.dtype)
            first += count
        return copy, table


class _Tiles:
    """Draws per position, _TILE positions at a time, each tile from a generator of its own."""

    def __init__(self, draw: Callable[[np.random.Generator], Any], seed: tuple[int, ...]) -> None:
        self._draw = draw
        self._seed = seed
        self._drawn = self._tile(0)

    def first(self, count: int) -> torch.Tensor:
        """Draws of positions 0..count-1."""
        have = len(self._drawn)
        if count > have:
            tiles = range(have // _TILE, -(-count // _TILE))
            self._drawn = torch.cat([self._drawn, *(self._tile(index) for index in tiles)])
        return self._drawn[:count]

    def _tile(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._draw(np.random.default_rng((*self._seed, index))))


def _normal(shape: tuple[int, ...]) -> Callable[[np.random.Generator], Any]:
    return lambda rng: rng.standard_normal(shape, dtype=np.float32)


def _chosen(spec: ModelSpec, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The asked layers, None for all; UsageError where the model has no such layer."""
    chosen = tuple(range(len(spec.layers))) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < len(spec.layers):
            raise UsageError(f"the model has layers 0..{len(spec.layers) - 1}, asked for layer {layer}")
    return chosen


def _check_idle(engine: Engine, doing: str) -> None:
    if engine.has_unfinished:
        raise UsageError(f"{doing} needs an idle engine, found unfinished requests; finish or abort them")
