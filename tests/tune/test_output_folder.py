"""The output folder belongs to one run at a time, whatever ends or dies beside it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from kvtune.errors import UsageError
from kvtune.tune.study import locked_folder


def test_a_folder_in_use_is_refused_and_free_once_the_run_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked_folder(out):
        with pytest.raises(UsageError, match="another run is writing"), locked_folder(out):
            pass
        assert (out / ".lock").exists(), "the one that was refused took the lock away"
    with locked_folder(out):
        pass
    assert list(out.iterdir()) == []


def test_a_lock_file_that_a_killed_run_left_behind_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    with locked_folder(tmp_path):
        pass


def test_a_lock_on_a_file_that_its_last_holder_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by us, removed by whoever held it, made and locked anew by a third run: the third one has it."""
    real, others = fcntl.flock, []

    def late(descriptor: int, operation: int) -> Any:
        if not others:
            (tmp_path / ".lock").unlink()
            others.append(os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT))
            real(others[0], fcntl.LOCK_EX)
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="another run is writing"), locked_folder(tmp_path):
        pass
    os.close(others[0])
    with locked_folder(tmp_path):
        pass


def test_a_folder_that_goes_away_while_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = tmp_path / "out", os.open, []

    def late(path: Any, *more: Any) -> int:
        calls.append(path)
        if len(calls) == 1:
            out.rmdir()
        return real(path, *more)

    monkeypatch.setattr(os, "open", late)
    with locked_folder(out):
        assert (out / ".lock").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" if kind == "a file" else tmp_path / "file" / "out"
    with pytest.raises(UsageError, match="cannot write to the output folder") as caught, locked_folder(out):
        pass
    assert "\n" not in str(caught.value)
