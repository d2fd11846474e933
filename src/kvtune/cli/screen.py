"""The way every text takes to a terminal: what users, models and files say may be in it."""

from __future__ import annotations

import sys

from kvtune.printable import printable

__all__ = ["say"]


def say(text: str, *, is_aside: bool = False, end: str = "\n") -> None:
    """Print `text` with control characters made visible; `is_aside`: on stderr. Not for JSON, which is ASCII
    with escapes of its own."""
    print(printable(text), file=sys.stderr if is_aside else sys.stdout, end=end)
