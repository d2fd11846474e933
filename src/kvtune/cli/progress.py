"""Progress with time left, on stderr, for anything that takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from kvtune.printable import one_line

__all__ = ["TimeLeft"]

QUIET_S: Final = 2.0
_REDRAW_S: Final = 0.2
_LINE_S: Final = 10.0
_ENOUGH: Final = 0.01
"""Share that must be done before the time left is more than a guess."""


class TimeLeft:
    """Called with (share done, what is running). A live line on a terminal, a line every ten seconds
    elsewhere; nothing at all when it is over within two seconds. A context manager, which clears the line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._next_s = QUIET_S
        self._is_drawn = False

    def __enter__(self) -> TimeLeft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, share: float, what: str) -> None:
        elapsed = self._clock() - self._begin
        if elapsed < self._next_s or share < _ENOUGH or sys.stderr is None:
            return
        self._next_s = elapsed + (_REDRAW_S if self._is_terminal else _LINE_S)
        minutes, seconds = divmod(round(elapsed * (1 / min(1.0, share) - 1)), 60)
        line = f"{min(1.0, share):4.0%}  {minutes}:{seconds:02d} left  {one_line(what)}"
        if self._is_terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._is_drawn = True
        else:
            print(line, file=sys.stderr, flush=True)
