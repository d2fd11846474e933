"""Native libraries of this package, by ctypes: finding one, and opening it if it speaks our ABI. No torch."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from kvtune.errors import HostError

__all__ = ["find_library", "open_library"]


def find_library(package: str, name: str) -> Path | None:
    """Where libNAME.so of a subpackage lies, None where it was not built."""
    # the package's search path knows both places of an editable install
    for root in sys.modules["kvtune"].__path__:
        path = Path(root) / package / f"lib{name}.so"
        if path.is_file():
            return path
    return None


def open_library(
    path: Path, what: str, *, abi_symbol: str, abi_version: int, is_one: bool = False,
    loader: type[ctypes.CDLL] = ctypes.CDLL,
) -> ctypes.CDLL:  # fmt: skip
    """The loaded library. HostError if it does not load or speaks another ABI than `abi_version`, which it
    tells by `abi_symbol`; `what` names it in messages, in the singular if `is_one`."""
    try:
        library = loader(str(path))
        found = int(getattr(library, abi_symbol)())
    except (OSError, AttributeError) as error:  # not a library, or another one
        raise HostError(f"{what} {path} {'does' if is_one else 'do'} not load: {error}") from None
    if found != abi_version:
        speak = "speaks" if is_one else "speak"
        raise HostError(f"{what} {path} {speak} ABI {found}, this kvtune needs {abi_version}: rebuild")
    return library
