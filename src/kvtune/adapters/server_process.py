"""One server process and everything below it: started in a session of its own, stopped as a whole.

`process_guard` (a separate small process) holds the session; this side only keeps the pipe to it.
Closing the pipe is the one way to stop: it happens in `stop`, at interpreter exit, and by itself when
kvtune dies, so no path leaves a server behind and no process is ever found by name.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from kvtune.errors import EngineUnavailableError, InvariantError

__all__ = ["ServerProcess", "free_loopback_port"]

GUARD = Path(__file__).with_name("process_guard.py")
GRACE_S = 10.0
"""Between TERM and KILL. vLLM needs a second or two to close its workers."""


def free_loopback_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago. Whoever uses it must verify who answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A running command. Use as a context manager; `stop` is idempotent.

    `log_path` receives its standard output and error. Raises EngineUnavailableError if it cannot start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str],
        cwd: Path,
        grace_s: float = GRACE_S,
    ) -> None:
        self.command = tuple(command)
        self.log_path = log_path
        self._grace_s = grace_s
        try:
            with log_path.open("wb") as log:
                self._guard = subprocess.Popen(  # noqa: S603 (the user's own engine)
                    [sys.executable, "-I", "-S", str(GUARD), str(grace_s), *command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=cwd,
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineUnavailableError(f"cannot start {command[0]}: {error.strerror or error}") from error
        atexit.register(self.stop)

    @property
    def session_id(self) -> int:
        """Session and process group of everything that was started."""
        return self._guard.pid

    def exit_code(self) -> int | None:
        """None while the command runs; afterwards its exit code (128 + n: ended by signal n)."""
        return self._guard.poll()

    def stop(self) -> int:
        """End the whole session (TERM, then KILL after the grace time); returns the exit code.

        A second interrupt while waiting shortens the grace time to nothing, it never skips the kill.
        """
        try:
            self._order_stop()
            return self._guard.wait(timeout=self._grace_s + 10)
        except subprocess.TimeoutExpired:
            self._kill_session()
            message = f"the process guard of {self.command[0]} hung; its session was killed"
            raise InvariantError(message) from None
        except KeyboardInterrupt:
            self._kill_session()
            raise
        finally:
            atexit.unregister(self.stop)

    def _order_stop(self) -> None:
        """Close the pipe; TERM as well, because a forked child of ours may hold the other end open."""
        pipe = self._guard.stdin
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._guard.terminate()  # does nothing once the guard has been collected

    def _kill_session(self) -> None:
        """The guard is not collected yet, so its process group id cannot belong to a stranger."""
        if self._guard.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()

    def log_tail(self, max_bytes: int = 65536) -> str:
        """The end of the log as text."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - max_bytes))
            return log.read().decode("utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
