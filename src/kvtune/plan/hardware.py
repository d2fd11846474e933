"""GPUs by name with the memory their driver reports."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from kvtune.errors import UsageError

__all__ = ["GPUS", "find_gpu"]

_MIB = 1 << 20
GPUS: Final[Mapping[str, int]] = MappingProxyType({
    "T4": 15360 * _MIB,
    "RTX-3090": 24576 * _MIB,
    "RTX-4090": 24564 * _MIB,
    "RTX-5090": 32607 * _MIB,
    "L4": 23034 * _MIB,
    "A10": 23028 * _MIB,
    "L40S": 46068 * _MIB,
    "A100-40GB": 40960 * _MIB,
    "A100-80GB": 81920 * _MIB,
    "H100-80GB": 81559 * _MIB,
    "H200": 143771 * _MIB,
    "MI300X": 196592 * _MIB,
})  # fmt: skip
"""Name -> total memory in bytes as nvidia-smi or rocm-smi reports it."""


def find_gpu(name: str) -> str:
    """The listed name that `name` means, whatever its case and separators. UsageError with the near ones."""
    simple = {re.sub(r"[^a-z0-9]", "", gpu.lower()): gpu for gpu in GPUS}
    asked = re.sub(r"[^a-z0-9]", "", name.lower())
    matches = [gpu for key, gpu in simple.items() if key == asked] or [
        gpu for key, gpu in simple.items() if asked and key.startswith(asked)
    ]
    if len(matches) == 1:
        return matches[0]
    near = matches or [simple[key] for key in difflib.get_close_matches(asked, simple, n=3)] or list(GPUS)
    raise UsageError(f"unknown GPU {name!r}; did you mean: {', '.join(near)}?")
