"""Every exception kvtune raises on purpose, as one tree.

    KVTuneError                     exit code
    ├── UsageError                  2   the request itself is wrong (flag, value, combination)
    │   └── InputFileError          2   a file the user named cannot be read or parsed
    ├── UnsupportedModelError       2   a layer kind, RoPE kind or model family we refuse by name
    ├── HostError           3   something is missing on this machine
    │   ├── MissingExtraError       3   an optional dependency; the message holds the install line
    │   └── EngineUnavailableError  3   the engine to measure is absent or did not start
    ├── TargetError                 3   a running engine failed, died or answered nonsense
    └── InvariantError              70  a bug in kvtune: an internal check did not hold

Messages are one line: what was asked, what was found, what to do.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "EngineUnavailableError",
    "HostError",
    "InputFileError",
    "InvariantError",
    "KVTuneError",
    "MissingExtraError",
    "TargetError",
    "UnsupportedModelError",
    "UsageError",
]


class KVTuneError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(KVTuneError):
    """The request is wrong: unknown codec, impossible value, contradictory flags."""

    exit_code = 2


class InputFileError(UsageError):
    """A file named by the user cannot be read or parsed; says which line."""


class UnsupportedModelError(KVTuneError):
    """A model kvtune refuses to size or to run; names the layer or field."""

    exit_code = 2


class HostError(KVTuneError):
    """Something this machine lacks."""

    exit_code = 3


class MissingExtraError(HostError):
    """An optional dependency is not installed; the message is the line that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'kvtune[{extra}]'")


class EngineUnavailableError(HostError):
    """The engine to be measured was not found or did not start."""


class TargetError(KVTuneError):
    """A running engine died, hung or answered something that cannot be used."""

    exit_code = 3


class InvariantError(KVTuneError):
    """An internal invariant did not hold: a bug in kvtune, never the user's fault."""

    exit_code = 70
