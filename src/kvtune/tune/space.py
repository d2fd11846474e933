"""The search space as the engine states it: points, the baseline, and which knobs change what is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvtune.errors import TargetError, UsageError
from kvtune.recipe import canonical_json
from kvtune.target import Config, Knob, Target

__all__ = ["SearchSpace", "with_layers"]

ReadKey = str
"""Canonical text of the lossy knobs: configurations that share it return the same bits on every read."""


class SearchSpace:
    """All combinations of the knobs' values. Points are dicts; `label` gives each a canonical text."""

    def __init__(self, knobs: Sequence[Knob]) -> None:
        if not knobs:
            raise TargetError("the engine offers no knob to search over")
        for knob in knobs:
            if knob.baseline not in knob.values:
                raise TargetError(f"the baseline {knob.baseline!r} of {knob.name} is not one of its values")
        self.knobs = tuple(knobs)
        self.baseline: dict[str, Any] = {k.name: k.baseline for k in knobs}
        self._lossy = tuple(k.name for k in knobs if k.is_lossy)

    @property
    def size(self) -> int:
        size = 1
        for knob in self.knobs:
            size *= len(knob.values)
        return size

    def label(self, config: Config) -> str:
        return canonical_json({k.name: config[k.name] for k in self.knobs} | _layers(config))

    def choices(self) -> dict[str, dict[str, Any]]:
        """Knob name -> text of a value -> value: samplers draw texts, so a value may be any JSON."""
        return {k.name: {canonical_json(v): v for v in k.values} for k in self.knobs}

    def read_key(self, config: Config) -> ReadKey:
        return canonical_json({name: config[name] for name in self._lossy} | _layers(config))

    def is_lossy(self, config: Config) -> bool:
        """Whether reads may differ from the baseline's."""
        return self.read_key(config) != self.read_key(self.baseline)

    def num_changed(self, config: Config) -> int:
        """How many knobs differ from the baseline's; codecs of single layers count as one more."""
        return sum(config[k.name] != k.baseline for k in self.knobs) + len(_layers(config))

    def configs(self) -> Iterator[dict[str, Any]]:
        names = [k.name for k in self.knobs]
        for values in itertools.product(*(k.values for k in self.knobs)):
            yield dict(zip(names, values, strict=True))

    def ladder(self, target: Target, *, context: int) -> list[tuple[float, dict[str, Any]]]:
        """Every combination of lossy knobs, the others at the baseline, as (bytes per token, config).

        Largest first; combinations that the engine refuses to size are left out.
        """
        values = [k.values if k.is_lossy else (k.baseline,) for k in self.knobs]
        names = [k.name for k in self.knobs]
        rungs: list[tuple[float, dict[str, Any]]] = []
        for point in itertools.product(*values):
            config = dict(zip(names, point, strict=True))
            try:
                rungs.append((target.kv_bytes_per_token(config, context=context), config))
            except UsageError:
                continue
        return sorted(rungs, key=lambda rung: (-rung[0], self.label(rung[1])))


def _layers(config: Config) -> dict[str, Any]:
    """Codecs of single layers, which no knob holds."""
    table = config.get("layer_codecs")
    return {"layer_codecs": {str(layer): list(pair) for layer, pair in table.items()}} if table else {}


def with_layers(config: Config, table: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
    """The configuration with these (k, v) codecs by layer, written shortly: the commonest pair as `k_codec`
    and `v_codec`, the layers that differ as `layer_codecs` (left out where none does)."""
    pairs = list(table.values())
    common = max(dict.fromkeys(pairs), key=pairs.count)
    out = {name: value for name, value in config.items() if name != "layer_codecs"}
    out |= {"k_codec": common[0], "v_codec": common[1]}
    rest = {str(layer): list(pair) for layer, pair in sorted(table.items()) if pair != common}
    return {**out, "layer_codecs": rest} if rest else out
