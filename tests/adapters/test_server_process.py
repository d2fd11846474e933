"""The process guard: whatever happens, what was started ends and what was not started lives."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtune.adapters.server_process import ServerProcess, free_loopback_port
from kvtune.errors import EngineUnavailableError

SERVER = """
import os, signal, subprocess, sys, time
mode = sys.argv[1]
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("pids", os.getpid(), worker.pid, daemon.pid, flush=True)
if mode == "crash":
    os._exit(7)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_for(condition, timeout_s: float = 10.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("timed out")


def pids_in(log: Path) -> list[int]:
    if not log.exists():
        return []
    rows = [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("pids")]
    return [int(pid) for pid in rows[0]] if rows else []


def start(tmp_path: Path, mode: str, **settings) -> ServerProcess:
    return ServerProcess(
        [sys.executable, "-c", SERVER, mode],
        log_path=tmp_path / "server.log",
        environment=dict(os.environ),
        cwd=tmp_path,
        **settings,
    )


def test_stopping_ends_the_server_its_worker_and_its_daemon(tmp_path):
    server = start(tmp_path, "normal")
    pids = wait_for(lambda: pids_in(server.log_path))
    assert all(is_alive(pid) for pid in pids)
    code = server.stop()
    assert code == 128 + signal.SIGTERM
    assert not any(is_alive(pid) for pid in pids)
    assert server.stop() == code


def test_a_server_that_ignores_term_is_killed_after_the_grace_time(tmp_path):
    server = start(tmp_path, "stubborn", grace_s=0.3)
    pids = wait_for(lambda: pids_in(server.log_path))
    assert server.stop() == 128 + signal.SIGKILL
    assert not any(is_alive(pid) for pid in pids)


def test_a_crashed_server_takes_its_orphans_with_it_and_reports_its_code(tmp_path):
    with start(tmp_path, "crash", grace_s=0.5) as server:
        pids = wait_for(lambda: pids_in(server.log_path))
        assert wait_for(server.exit_code) == 7
        assert not any(is_alive(pid) for pid in pids)


def test_a_server_killed_from_outside_is_noticed_and_cleaned_up(tmp_path):
    with start(tmp_path, "normal") as server:
        pids = wait_for(lambda: pids_in(server.log_path))
        os.kill(pids[0], signal.SIGKILL)
        assert wait_for(server.exit_code) == 128 + signal.SIGKILL
        assert not any(is_alive(pid) for pid in pids)


def test_an_exception_in_the_caller_stops_the_server(tmp_path):
    with pytest.raises(KeyError), start(tmp_path, "normal") as server:
        pids = wait_for(lambda: pids_in(server.log_path))
        raise KeyError("caller")
    assert not any(is_alive(pid) for pid in pids)


CALLER = """
import os, sys, time
from pathlib import Path
from kvtune.adapters.server_process import ServerProcess
folder = Path(sys.argv[1])
server = ServerProcess([sys.executable, "-c", sys.argv[2], "normal"], log_path=folder / "server.log",
                       environment=dict(os.environ), cwd=folder)
with server:
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_caller_ends_the_server_ends_and_a_stranger_with_its_name_lives(tmp_path, number):
    stranger_path = tmp_path / "vllm-sleep"
    stranger_path.symlink_to("/bin/sleep")
    stranger = subprocess.Popen([stranger_path, "600"])
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(tmp_path), SERVER], stderr=subprocess.DEVNULL
    )
    try:
        pids = wait_for(lambda: pids_in(tmp_path / "server.log"))
        caller.send_signal(number)
        caller.wait(timeout=15)
        wait_for(lambda: not any(is_alive(pid) for pid in pids))
        assert is_alive(stranger.pid)
    finally:
        for process in (stranger, caller):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def test_a_command_that_does_not_exist_ends_with_a_readable_log(tmp_path):
    server = ServerProcess(["/no/such/python"], log_path=tmp_path / "log", environment={}, cwd=tmp_path)
    with server:
        assert wait_for(server.exit_code) == 127
    assert "cannot run /no/such/python: No such file" in server.log_tail()


def test_a_working_folder_that_does_not_exist_is_refused_in_one_line(tmp_path):
    with pytest.raises(EngineUnavailableError, match="cannot start"):
        ServerProcess(["true"], log_path=tmp_path / "log", environment={}, cwd=tmp_path / "gone")


def test_a_free_port_is_on_the_loopback_and_can_be_bound():
    assert 1024 <= free_loopback_port() < 65536
