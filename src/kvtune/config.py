"""Every setting of cache, scheduler and engine: frozen dataclasses with unit, range and help.

Field metadata carries `unit`, `low`, `high`, `help`, and `hot` (may change while running).
`CacheConfig`, `SchedulerConfig` and `EngineConfig` validate on construction and raise UsageError.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kvtune.errors import UsageError

__all__ = [
    "MAX_SEED",
    "CacheConfig",
    "EngineConfig",
    "SchedulerConfig",
    "format_bytes",
    "format_layer_codecs",
    "parse_bytes",
    "parse_duration",
]

_BYTE_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": 2**10,
    "m": 10**6, "mb": 10**6, "mib": 2**20,
    "g": 10**9, "gb": 10**9, "gib": 2**30,
    "t": 10**12, "tb": 10**12, "tib": 2**40,
}  # fmt: skip
MAX_SEED = 2**64 - 1
"""Seeds key 64-bit counter-based generators."""
MAX_SECONDS = 10**8
"""Three years."""
MAX_BYTES = 2**60
"""Beyond any machine; what is larger is a slip of the finger, or no number at all."""
_TIME_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_bytes(text: str | int) -> int:
    """`"512MiB"`, `"2GB"`, `1048576` -> bytes. Raises UsageError on anything else."""
    if isinstance(text, bool):
        raise UsageError(f"expected a size such as 512MiB, found {text!r}")
    if isinstance(text, int):
        value, unit = float(text), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
        if match is None or match[2].lower() not in _BYTE_UNITS:
            raise UsageError(f"expected a size such as 512MiB, found {text!r}")
        value, unit = float(match[1]), match[2].lower()
    if value * _BYTE_UNITS[unit] > MAX_BYTES:
        raise UsageError(f"expected a size of at most {format_bytes(MAX_BYTES)}, found {str(text)[:40]!r}")
    size = int(value * _BYTE_UNITS[unit])
    if size <= 0:
        raise UsageError(f"expected a size above zero, found {text!r}")
    return size


def format_bytes(size: float) -> str:
    """1536 -> '1.50 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def format_layer_codecs(table: Mapping[Any, Any]) -> str:
    """`{"2": ["int8", "n4_rh"], "3": ["int8", "n4_rh"]}` -> 'layers 2-3 int8/n4_rh'; '' for an empty one."""
    spans: list[tuple[int, int, str]] = []
    for layer, (k, v) in sorted((int(layer), pair) for layer, pair in table.items()):
        if spans and spans[-1][1] == layer - 1 and spans[-1][2] == f"{k}/{v}":
            spans[-1] = (spans[-1][0], layer, f"{k}/{v}")
        else:
            spans.append((layer, layer, f"{k}/{v}"))
    return ", ".join(
        f"layer {low} {pair}" if low == high else f"layers {low}-{high} {pair}" for low, high, pair in spans
    )


def parse_duration(text: str | float) -> float:
    """`"5m"`, `"300ms"`, `"90"` -> seconds. Raises UsageError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _TIME_UNITS or float(match[1]) <= 0:
        raise UsageError(f"expected a duration such as 5m or 300ms, above zero, found {str(text)[:40]!r}")
    seconds = float(match[1]) * _TIME_UNITS[match[2]]
    if seconds > MAX_SECONDS:
        raise UsageError(f"expected a duration of at most {MAX_SECONDS:,} s, found {str(text)[:40]!r}")
    return seconds


def _knob(default: Any, help: str, **meta: Any) -> Any:  # noqa: A002
    return field(default=default, metadata={"help": help, **meta})


def _check_range(config: Any) -> None:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        low, high = item.metadata.get("low"), item.metadata.get("high")
        if value is None or (low is None and high is None):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{item.name} must be a number, found {value!r}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise UsageError(f"{item.name} must lie in [{low}, {high}], found {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """Ranges are checked on construction; as a dict, unknown names are refused."""

    def __post_init__(self) -> None:
        _check_range(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reverses it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        _refuse_unknown(cls, data)
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig(_Settings):
    """What the KV cache holds and how. Codec names are checked by `kvtune.spec`."""

    kv_budget: str | int = _knob("1GiB", "memory for KV blocks", unit="bytes")
    block_size: int = _knob(
        16, "tokens per block; kernels need a multiple of 16", unit="tokens", low=1, high=4096
    )
    k_codec: str = _knob("bf16", "how keys are stored")
    v_codec: str = _knob("bf16", "how values are stored")
    layer_codecs: Mapping[int, tuple[str, str]] = field(
        default_factory=dict[int, tuple[str, str]],
        metadata={"help": "layer index -> (k_codec, v_codec); overrides the two above"},
    )
    key_centring: str = _knob(
        "auto",
        "what rotated key codecs take from all keys: auto (bias and probe) | bias (of k_proj) | "
        "probe (mean key) | off",
    )
    first_block_16bit: bool = _knob(False, "keep block 0 of every sequence in 16 bit")
    enable_prefix_caching: bool = _knob(True, "share blocks of equal prefixes")
    eviction_policy: str = _knob(
        "guarded", "which idle block leaves first: guarded | lru | fifo | gdsf | hazard"
    )

    squeeze_planes: Mapping[int, tuple[int, int]] = field(
        default_factory=dict[int, tuple[int, int]],
        metadata={
            "help": "layer index -> planes of (keys, values) that reads need under memory pressure, 2 or 1; "
            "name only what was proven; empty: precision is never lowered"
        },
    )
    plane_arena: str | int | None = _knob(
        None, "host memory where dropped low planes rest; None: they come back by recompute", unit="bytes"
    )

    def __post_init__(self) -> None:
        _check_range(self)
        parse_bytes(self.kv_budget)
        if self.plane_arena is not None:
            parse_bytes(self.plane_arena)
        for layer, planes in self.squeeze_planes.items():
            if len(planes) != 2 or not all(n in (1, 2) for n in planes):
                raise UsageError(
                    f"squeeze_planes must give 1 or 2 planes of keys and of values, found {planes!r} "
                    f"for layer {layer}"
                )
        if self.key_centring not in ("auto", "bias", "probe", "off"):
            raise UsageError(f"key_centring must be auto, bias, probe or off, found {self.key_centring!r}")

    @property
    def kv_budget_bytes(self) -> int:
        return parse_bytes(self.kv_budget)

    @property
    def plane_arena_bytes(self) -> int:
        return 0 if self.plane_arena is None else parse_bytes(self.plane_arena)

    def codecs_of(self, layer: int) -> tuple[str, str]:
        """(k_codec, v_codec) of one layer."""
        return self.layer_codecs.get(layer, (self.k_codec, self.v_codec))

    def droppable_sides(self, layer: int) -> tuple[str, ...]:
        """Sides of one layer ("k", "v") that may lose their low plane while the engine runs."""
        planes = self.squeeze_planes.get(layer, (2, 2))
        return tuple(side for side, count in zip("kv", planes, strict=True) if count == 1)

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["layer_codecs"] = {str(k): list(v) for k, v in sorted(self.layer_codecs.items())}
        out["squeeze_planes"] = {str(k): list(v) for k, v in sorted(self.squeeze_planes.items())}
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        values = dict(data)
        _refuse_unknown(cls, values)
        if "layer_codecs" in values:
            try:
                values["layer_codecs"] = {
                    int(k): (str(v[0]), str(v[1])) for k, v in dict(values["layer_codecs"]).items()
                }
            except (TypeError, ValueError, IndexError, KeyError) as error:
                raise UsageError(f"layer_codecs must map a layer index to [k, v]: {error}") from error
        if "squeeze_planes" in values:
            try:
                values["squeeze_planes"] = {
                    int(k): (int(v[0]), int(v[1])) for k, v in dict(values["squeeze_planes"]).items()
                }
            except (TypeError, ValueError, IndexError, KeyError) as error:
                raise UsageError(f"squeeze_planes must map a layer index to [k, v]: {error}") from error
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig(_Settings):
    """How requests share a step. All of it is hot: it may change between steps."""

    max_num_seqs: int = _knob(64, "sequences running at once", low=1, high=65536, hot=True)
    max_num_batched_tokens: int = _knob(
        4096, "tokens computed per step", unit="tokens", low=1, high=1 << 20, hot=True
    )
    max_prefill_chunk: int = _knob(
        512, "prompt tokens of one request computed per step", unit="tokens", low=1, high=1 << 20, hot=True
    )
    max_prefill_beside_decodes: int = _knob(
        128, "prompt tokens computed in a step in which others decode: fewer keep inter-token latency "
        "steady, more prefill faster", unit="tokens", low=1, high=1 << 20, hot=True,
    )  # fmt: skip
    watermark: float = _knob(0.05, "share of blocks kept free at admission", low=0.0, high=0.9, hot=True)
    admission: str = _knob("watermark", "watermark | peak (also by the expected peak of the batch)", hot=True)
    admission_z: float = _knob(
        1.0, "standard deviations kept above the expected peak", low=0.0, high=10.0, hot=True
    )
    reserved: float = _knob(0.02, "share of blocks only priority > 0 may use", low=0.0, high=0.9, hot=True)
    restore_blocks_per_step: int = _knob(
        64, "blocks whose low plane comes back in a step in which others run", unit="blocks", low=1,
        high=1 << 20, hot=True,
    )  # fmt: skip
    max_preemptions: int = _knob(
        3, "a request preempted this often is preempted last", low=0, high=1000, hot=True
    )

    def __post_init__(self) -> None:
        _check_range(self)
        if self.admission not in ("watermark", "peak"):
            raise UsageError(f"admission must be watermark or peak, found {self.admission!r}")

    @property
    def chunk(self) -> int:
        """Tokens of one sequence computed per step at most."""
        return min(self.max_prefill_chunk, self.max_num_batched_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(_Settings):
    """How the model runs. None of it is hot."""

    dtype: str = _knob("auto", "auto (the checkpoint's) | float32 | bfloat16 | float16")
    max_model_len: int | None = _knob(None, "longest sequence; None takes the model's", unit="tokens", low=1)
    num_threads: int | None = _knob(None, "torch and kernel threads; None leaves torch's", low=1, high=1024)
    kernel: str = _knob("auto", "auto | native | torch | reference")
    pad_rows: int = _knob(
        0, "pad each forward to a multiple of this many rows (bit-equality tests use 16)", low=0, high=4096
    )
    seed: int = _knob(0, "seed of requests that bring none")

    def __post_init__(self) -> None:
        _check_range(self)
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(f"dtype must be auto, float32, bfloat16 or float16, found {self.dtype!r}")
        if self.kernel not in ("auto", "native", "torch", "reference"):
            raise UsageError(f"kernel must be auto, native, torch or reference, found {self.kernel!r}")


def _refuse_unknown(cls: type, data: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise UsageError(
            f"unknown setting {unknown[0]!r} in {cls.__name__}; known: {', '.join(sorted(known))}"
        )
