"""Read nested codes from one plane or from both, layer by layer and side by side, while an engine lives."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from kvtune.engine.engine import Engine
from kvtune.errors import UsageError
from kvtune.kernels import LayerCache

__all__ = ["reading_planes"]

Planes = Mapping[int, tuple[int, int]]
"""Model layer index -> planes read of (keys, values): 2 or 1."""


@contextmanager
def reading_planes(engine: Engine, planes: Planes) -> Generator[None]:
    """Read those layers' planes while the context lasts; what is stored stays as it is.

    For measuring what a lower precision costs: nothing computed under it stays cached. Afterwards reads are
    what they were, bit for bit. UsageError for a layer or side that is not nested, for a number of planes
    that does not exist, and for an engine with unfinished requests at either end.
    """
    caches = {layer: _cache(engine, layer) for layer in planes}
    for layer, (k, v) in planes.items():
        _check(layer, "k", k, caches[layer])
        _check(layer, "v", v, caches[layer])
    _check_idle(engine)
    before = {layer: (cache.k_planes, cache.v_planes) for layer, cache in caches.items()}
    _set(engine, caches, planes)
    try:
        yield
        _check_idle(engine)
    finally:
        _set(engine, caches, before)


def _cache(engine: Engine, layer: int) -> LayerCache:
    try:
        return engine.attention_layers[layer].cache
    except KeyError:
        known = ", ".join(str(index) for index in engine.attention_layers)
        raise UsageError(f"layer {layer} has no KV cache; layers that have one: {known}") from None


def _check(layer: int, side: str, planes: int, cache: LayerCache) -> None:
    if planes not in (1, 2):
        raise UsageError(
            f"a nested code has 1 or 2 planes to read, found {planes} for {side} of layer {layer}"
        )
    codec = cache.layout.k_codec if side == "k" else cache.layout.v_codec
    if planes == 1 and side not in cache.low_planes:
        raise UsageError(
            f"{side} of layer {layer} is stored as {codec}, which has no second plane; use n8_rh"
        )


def _check_idle(engine: Engine) -> None:
    if engine.has_unfinished:
        raise UsageError("read planes change between requests: finish or abort those that run first")


def _set(engine: Engine, caches: Mapping[int, LayerCache], planes: Planes) -> None:
    for layer, cache in caches.items():
        cache.k_planes, cache.v_planes = planes[layer]
    engine.reset_prefix_cache()
