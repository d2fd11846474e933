"""The OpenMP threads that torch computes with, for native code beside it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

__all__ = ["torch_team"]


@functools.cache
def torch_team() -> int:
    """Address of `GOMP_parallel` in the OpenMP that torch runs on; 0 where torch has no such OpenMP.

    A symbol is looked up in torch's library and in what that depends on, so that another package's copy of
    OpenMP is never taken for torch's.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("libtorch_cpu.*")):
        try:
            parallel = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(parallel, ctypes.c_void_p).value or 0
    return 0
