"""The settings inside a recipe: how knobs become settings, and which of them nothing could take.

A hash is no signature: whoever edits a recipe can make it agree, so every value is checked against what it
becomes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, cast

from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig, parse_bytes
from kvtune.errors import InputFileError, UsageError
from kvtune.printable import one_line
from kvtune.spec import codec_storage

__all__ = ["check_foreign", "check_settings", "configuration_of", "short"]

BLOCK_TOKENS: Final = 16
MAX_LAYERS: Final = 4096
MAX_WORD: Final = 200
MAX_NUMBER: Final = 1 << 40
_COUNTS: Final = frozenset(("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"))

_CACHE_KNOBS = frozenset(f.name for f in dataclasses.fields(CacheConfig))
_SCHEDULER_KNOBS = frozenset(f.name for f in dataclasses.fields(SchedulerConfig))
_ENGINE_KNOBS = frozenset(f.name for f in dataclasses.fields(EngineConfig))


def configuration_of(
    knobs: Mapping[str, Any], *, kv_budget_bytes: int | None = None, engine: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Sort searched knobs into the settings classes: `{"knobs", "cache", "scheduler", "engine"}`.

    `engine` adds settings that were not searched (dtype, max_model_len). Knobs of a foreign engine
    (kv_dtype) stay in "knobs" only.
    """
    cache = {k: v for k, v in knobs.items() if k in _CACHE_KNOBS}
    if kv_budget_bytes is not None:
        cache["kv_budget"] = kv_budget_bytes
    if "layer_codecs" in cache:
        cache["layer_codecs"] = {str(k): list(v) for k, v in dict(cache["layer_codecs"]).items()}
    return {
        "knobs": dict(knobs),
        "cache": cache,
        "scheduler": {k: v for k, v in knobs.items() if k in _SCHEDULER_KNOBS},
        "engine": {k: v for k, v in (engine or {}).items() if k in _ENGINE_KNOBS},
    }


_SECTIONS: Final[Mapping[str, type[CacheConfig] | type[SchedulerConfig] | type[EngineConfig]]] = {
    "cache": CacheConfig, "scheduler": SchedulerConfig, "engine": EngineConfig,
}  # fmt: skip


_JUDGED: Final = frozenset(
    ("k_codec", "v_codec", "layer_codecs", "key_centring", "first_block_16bit", "squeeze_planes")
)
"""Settings that change answers: what is served must name none that was not judged."""


def check_settings(body: Mapping[str, Any], source: str) -> None:
    """InputFileError unless our engine could take the settings and they agree with each other.

    A hash is no signature: whoever edits a recipe can make it agree. What is judged (`knobs`) must be what
    is served (`cache`, `scheduler`).
    """
    configuration = body["configuration"]
    for name, cls in _SECTIONS.items():
        _check_section(cls, configuration[name], f"{source}: configuration.{name}")
    baseline = body["baseline"].get("configuration")
    if isinstance(baseline, dict):
        _check_knobs(cast("dict[str, Any]", baseline), f"{source}: baseline.configuration")
    sorted_knobs = _check_knobs(configuration["knobs"], f"{source}: configuration.knobs")
    defaults = CacheConfig().to_dict()
    judged = {**{name: defaults[name] for name in _JUDGED}, **sorted_knobs["cache"]}
    for name, values in (("cache", judged), ("scheduler", sorted_knobs["scheduler"])):
        for knob, value in values.items():
            served = configuration[name].get(knob, value if knob not in sorted_knobs[name] else None)
            if served != value and knob != "kv_budget":
                raise InputFileError(
                    f"{source} contradicts itself: configuration.knobs.{knob} is {short(value)}, "
                    f"configuration.{name}.{knob} is {short(served)}"
                )
    proof, planes = body["quality"].get("squeeze"), judged["squeeze_planes"]
    if proof is not None and (not isinstance(proof, dict) or cast("Any", proof).get("planes") != planes):
        raise InputFileError(
            f"{source} contradicts itself: configuration.cache.squeeze_planes is {short(planes)}, "
            f"quality.squeeze judged others: {short(proof)}"
        )


def check_foreign(configuration: Mapping[str, Any], source: str) -> None:
    """InputFileError unless knobs and engine settings are short words, switches and sane numbers: they end on
    a command line."""
    for section in ("knobs", "engine"):
        for name, value in configuration[section].items():
            is_word = type(value) is str and len(value) <= MAX_WORD and value.isprintable()
            is_number = type(value) is int and 0 <= value <= MAX_NUMBER
            if not (is_word or is_number or value is None or type(value) is bool):
                where = f"{source}: configuration.{section}.{one_line(name, 40)}"
                raise InputFileError(f"{where} has the impossible value {short(value)}")
            if name in _COUNTS and not is_number and value is not None:
                raise InputFileError(f"{source}: {name} must be a number, found {short(value)}")
    try:
        parse_bytes(configuration["cache"].get("kv_budget", 1))
    except UsageError as error:
        raise InputFileError(f"{source}: configuration.cache.kv_budget: {error}") from error


def _check_knobs(knobs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The knobs by section; InputFileError for one that no section takes or that has an impossible value."""
    try:
        found = configuration_of(knobs)
    except (TypeError, ValueError) as error:
        raise InputFileError(f"{where}.layer_codecs must map a layer index to [k, v]") from error
    unknown = sorted(set(knobs) - set(found["cache"]) - set(found["scheduler"]))
    if unknown:
        raise InputFileError(f"{where}: kvtune's engine has no knob {short(unknown[0])}")
    for name in ("cache", "scheduler"):
        _check_section(_SECTIONS[name], found[name], where)
    return found


def _check_section(
    cls: type[CacheConfig] | type[SchedulerConfig] | type[EngineConfig], data: Mapping[str, Any], where: str
) -> None:
    for item in dataclasses.fields(cls):
        kind = type(item.default)
        if (
            item.name not in data
            or item.default is dataclasses.MISSING
            or item.metadata.get("unit") == "bytes"
        ):
            continue  # mappings and sizes are read by the settings themselves
        value = data[item.name]
        is_right = type(value) is kind or (kind is float and type(value) is int)
        if item.default is None:
            is_right = value is None or type(value) is int
        if not is_right:
            raise InputFileError(f"{where}.{item.name} has the impossible value {short(value)}")
    _check_tables(data, where)
    try:
        settings = cls.from_dict(data)
        if isinstance(settings, CacheConfig):
            _check_codecs(settings)
    except UsageError as error:
        raise InputFileError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputFileError(f"{where} is malformed: {short(str(error))}") from error


def _check_tables(data: Mapping[str, Any], where: str) -> None:
    """InputFileError for a layer written in two ways (2 and 02 are one), and for half a plane."""
    for name in ("layer_codecs", "squeeze_planes"):
        table = data.get(name)
        for layer, pair in cast("dict[str, Any]", table).items() if isinstance(table, dict) else ():
            is_layer = layer.isdecimal() and layer.isascii() and (layer == "0" or layer[0] != "0")
            kind = str if name == "layer_codecs" else int
            is_pair = isinstance(pair, list) and [type(x) for x in cast("list[Any]", pair)] == [kind, kind]
            if not (is_layer and is_pair):
                found = f"{short(layer)}: {short(pair)}"
                raise InputFileError(f"{where}.{name} must map a layer index to [k, v], found {found}")


def _check_codecs(cache: CacheConfig) -> None:
    """UsageError for a codec there is none of, or a block size that no layout has."""
    for codec in (
        cache.k_codec,
        cache.v_codec,
        *(name for pair in cache.layer_codecs.values() for name in pair),
    ):
        codec_storage(codec)
    if cache.block_size % BLOCK_TOKENS:
        raise UsageError(
            f"block_size {cache.block_size} is no multiple of {BLOCK_TOKENS}, which every layout needs"
        )
    layers = (*cache.layer_codecs, *cache.squeeze_planes)
    wrong = next((layer for layer in layers if not 0 <= layer < MAX_LAYERS), None)
    if wrong is not None:
        raise UsageError(f"layer_codecs or squeeze_planes name layer {short(wrong)}, which no model has")
    for layer in cache.squeeze_planes:
        for side, name in zip("kv", cache.codecs_of(layer), strict=True):
            if side in cache.droppable_sides(layer) and not codec_storage(name).low_bits:
                raise UsageError(f"squeeze_planes drops a plane of {name}, which has no second plane")


def short(value: Any) -> str:
    """What a message quotes of a value."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
