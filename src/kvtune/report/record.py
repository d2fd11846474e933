"""Reading a result mapping without trusting it: paths that may be absent, figures with intervals, formats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kvtune.config import format_layer_codecs
from kvtune.printable import printable

NOT_RECORDED = "not recorded"

_VALUE_KEYS = ("value", "mean", "estimate", "ratio")
_LOW_KEYS = ("low", "lower")
_HIGH_KEYS = ("high", "upper", "bound")
_PREFIXES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True, slots=True)
class Figure:
    """A number as recorded: value, 95 % interval where there is one, and the number of observations."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def as_sequence(value: Any) -> Sequence[Any]:
    """`value` if it is a list or tuple, else an empty one."""
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def find(record: Any, *paths: str) -> Any:
    """The first of several dotted paths that leads to something other than None."""
    for path in paths:
        value: Any = record
        for key in path.split("."):
            value = as_mapping(value).get(key)
        if value is not None:
            return value
    return None


@dataclass(frozen=True, slots=True)
class Place:
    """A value of a record and the JSON pointer (RFC 6901) that leads to it; absent values are None."""

    value: Any
    pointer: str = ""

    def at(self, *keys: str | int) -> Place:
        """Down through mappings by name and lists by index."""
        value, pointer = self.value, self.pointer
        for key in keys:
            if isinstance(key, int):
                inside = as_sequence(value)
                value = inside[key] if 0 <= key < len(inside) else None
            else:
                value = as_mapping(value).get(key)
            pointer += "/" + str(key).replace("~", "~0").replace("/", "~1")
        return Place(value, pointer)

    def items(self) -> list[tuple[str, Place]]:
        """Members of a mapping, in order."""
        return [(str(key), self.at(str(key))) for key in as_mapping(self.value)]

    def elements(self) -> list[Place]:
        """Elements of a list, in order."""
        return [self.at(index) for index in range(len(as_sequence(self.value)))]


def number(value: Any) -> float | None:
    """A finite int or float, else None; booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def figure(value: Any) -> Figure:
    """A number or {value|mean|ratio, low|lower, high|upper|bound, n} as a Figure."""
    if not isinstance(value, Mapping):
        return Figure(number(value))
    fields = as_mapping(value)
    count = number(fields.get("n"))
    return Figure(
        _first(fields, _VALUE_KEYS), _first(fields, _LOW_KEYS), _first(fields, _HIGH_KEYS),
        None if count is None else int(count),
    )  # fmt: skip


def _first(fields: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    found = (number(fields.get(key)) for key in keys)
    return next((value for value in found if value is not None), None)


def is_plottable(value: float | None) -> bool:
    """Whether a number can be placed on an axis."""
    return value is not None and math.isfinite(value)


def show(value: Any, unit: str = "") -> str:
    """A value as text: numbers to four digits in a readable unit, anything else as JSON or plain text."""
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return show_number(value, unit)
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def json_text(value: Any) -> str:
    """Indented JSON that people can read; what they could not see in it is written as JSON's own escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    hidden = {c for c in set(text) if printable(c) != c}
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in hidden}) if hidden else text


def show_number(value: float, unit: str = "") -> str:
    """`value` in `unit`: s (as ms below one second), bytes (binary prefixes), ratio, % or plain."""
    if not math.isfinite(value):
        return str(value)
    if unit == "s" and abs(value) < 1:
        return f"{_digits(value * 1000)} ms"
    if unit == "bytes":
        return _bytes(value)
    if unit == "ratio":
        return f"{_digits(value)}x"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{_digits(value)} {unit}".rstrip()


def _bytes(value: float) -> str:
    for size, prefix in _PREFIXES:
        if abs(value) >= 10 * size or (size >= 2**30 and value and value % size == 0):
            return f"{_digits(value / size)} {prefix}"
    return f"{_digits(value)} B"


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.3e}"
    if 1e-4 <= abs(value) < 1e5:
        decimals = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.3g}"


def tick_text(value: float, unit: str = "") -> str:
    """A round number beside an axis, in as few letters as it takes."""
    if not value:
        return "0"
    if unit == "bytes":
        return _bytes(value)
    in_ms = unit == "s" and abs(value) < 1
    scaled, name = (value * 1000, " ms") if in_ms else (value, f" {unit}" if unit else "")
    if unit == "share":
        scaled, name = value * 100, " %"
    if 1e-3 <= abs(scaled) < 1e9:
        return f"{scaled:,.10f}".rstrip("0").rstrip(".") + name
    digits, _, power = f"{scaled:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}{name}"


def show_layers(table: Any) -> str:
    """A recipe's `layer_codecs` as `layers 2-3 int8/n4_rh`, as it stands if it is none, "" for no table."""
    try:
        return format_layer_codecs(as_mapping(table))
    except (TypeError, ValueError):
        return show(table)


def show_interval(shown: Figure, unit: str = "") -> str:
    """The interval of a figure as `low to high`, or an empty text."""
    if shown.low is None and shown.high is None:
        return ""
    if shown.low is None:
        return f"at most {show_number(cast('float', shown.high), unit)}"
    if shown.high is None:
        return f"at least {show_number(shown.low, unit)}"
    return f"{show_number(shown.low, unit)} to {show_number(shown.high, unit)}"


def unit_of(metric: str) -> str:
    """The unit that a metric's name carries."""
    if metric.endswith("bytes_per_token") or metric.endswith("_bytes") or metric == "bytes":
        return "bytes"
    if metric.endswith("_s") and not metric.endswith("per_s"):
        return "s"
    if metric.endswith("hit_rate"):
        return "share"
    return ""


_LABELS = {
    "kv_bytes_per_token": "KV bytes per token", "requests_held": "requests held", "tpot_s": "TPOT",
    "ttft_s": "TTFT", "itl_s": "ITL", "e2e_s": "end to end", "kl": "KL", "flips": "top-1 flips",
    "delta_nll": "delta NLL", "num_slo_met": "requests within SLO", "num_requests": "requests",
    "num_failed": "failed requests", "duration_s": "duration", "output_tokens_per_s": "output tokens per s",
    "num_cached_tokens": "cached prompt tokens", "device_hit_rate": "prefix hit rate, device tier",
    "cost_per_million_tokens": "cost per million output tokens",
    "recomputed_tokens": "tokens recomputed", "preemptions": "preemptions", "goodput": "goodput per s",
}  # fmt: skip


def metric_label(name: str) -> str:
    """A metric's name for people: `ttft_s.p95` is TTFT p95, `decode_kl` KL by decoding."""
    if name.startswith("decode_"):
        return f"{metric_label(name.removeprefix('decode_'))} by decoding"
    stem, _, statistic = name.partition(".")
    return f"{_LABELS.get(stem, stem)} {statistic}".rstrip()


def short_config(config: Any) -> str:
    """A configuration in a few characters for a figure: its K and V codecs or its one KV dtype."""
    fields = as_mapping(config)
    if "k_codec" in fields or "v_codec" in fields:
        pair = f"{show(fields.get('k_codec'))}/{show(fields.get('v_codec'))}"
        apart = len(as_mapping(fields.get("layer_codecs")))
        return f"{pair}, {apart} layer{'s' * (apart > 1)} of their own" if apart else pair
    if "kv_dtype" in fields:
        return show(fields["kv_dtype"])
    return ", ".join(f"{k}={show(v)}" for k, v in list(fields.items())[:2]) or NOT_RECORDED


def long_config(config: Any) -> str:
    """Every knob of a configuration as `name=value`."""
    fields = as_mapping(config)
    return ", ".join(f"{k}={show(v)}" for k, v in fields.items()) or NOT_RECORDED
