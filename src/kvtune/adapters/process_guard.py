"""Runs one command and leaves nothing behind, however the process that asked for it ends.

Started as a script of its own (standard library only) by `kvtune.adapters.server_process`, as the
leader of a new session. Standard input is a pipe from kvtune that nobody writes to: when it closes
(kvtune stopped the server, was interrupted, crashed or was killed), when the guard gets TERM, INT or
HUP, or when the command ends, the guard ends every process of its session and every descendant, and
nothing else. It stays alive while they do, so neither the
session id nor a parent link can be reused by a stranger. Processes are never looked up by name.

    python process_guard.py GRACE_SECONDS COMMAND [ARGUMENT ...]

Exit code: the command's, 128 + n if signal n ended it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05


def main(arguments: list[str]) -> int:
    grace_s, command = float(arguments[0]), arguments[1:]
    orders: list[int] = []  # signals received; a handler, unlike "ignore", is not inherited by the command

    def on_signal(number: int, _frame: FrameType | None) -> None:
        orders.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    _adopt_orphans()
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 (the user's own engine)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror or error}\n")
        return 127
    while child.poll() is None and not orders and not _closed(sys.stdin.fileno(), POLL_S):
        pass
    _end_all(grace_s, child)
    code = child.wait()
    return 128 - code if code < 0 else code


def _adopt_orphans() -> None:
    """Make grandchildren whose parent dies children of this process (Linux), so that none escapes."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        return  # no prctl: the session id still finds everything but a daemon


def _closed(pipe: int, timeout_s: float) -> bool:
    readable, _, _ = select.select([pipe], [], [], timeout_s)
    return bool(readable) and os.read(pipe, 4096) == b""


def _end_all(grace_s: float, child: subprocess.Popen[bytes]) -> None:
    """TERM to all, then KILL to whoever is left after `grace_s`. Loops: a dying process may still fork."""
    deadline = time.monotonic() + grace_s
    _signal_all(signal.SIGTERM)
    while members := _members():
        _reap(child)
        if time.monotonic() >= deadline:
            for pid in members:
                _signal(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _signal_all(number: signal.Signals) -> None:
    for pid in _members():
        _signal(pid, number)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Collect adopted processes that ended; the command itself is left to its Popen."""
    child.poll()
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == child.pid:
                child.poll()
            else:
                os.waitpid(ended.si_pid, os.WNOHANG)
    except ChildProcessError:
        return


def _members() -> list[int]:
    """Living processes of this session or below this process, itself left out."""
    table = _process_table()
    me = os.getpid()
    ours = {me}
    while True:
        found = {pid for pid, (parent, session) in table.items() if parent in ours or session == me} - ours
        if not found:
            return sorted(ours - {me})
        ours |= found


def _process_table() -> dict[int, tuple[int, int]]:
    """pid -> (parent, session) of everything that is not a zombie."""
    table: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it ended between listing and reading
        if fields[0] not in ("Z", "X"):
            table[int(entry.name)] = (int(fields[1]), int(fields[3]))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
