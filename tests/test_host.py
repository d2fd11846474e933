from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtune.host import read_host


def fake_nvidia_smi(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "gpus", "driver"),
    [
        ("echo '550.54.15, NVIDIA H200, 143771 MiB'; echo '550.54.15, NVIDIA L4, 23034 MiB'",
         ("NVIDIA H200, 143771 MiB", "NVIDIA L4, 23034 MiB"), "550.54.15"),
        ("echo 'No devices were found'; exit 6", (), None), ("exit 0", (), None),
    ],
)  # fmt: skip
def test_gpus_and_their_driver_are_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, gpus: tuple[str, ...], driver: str | None
) -> None:
    fake_nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    host = read_host()
    assert (host.gpus, host.gpu_driver) == (gpus, driver)
    assert host.to_dict()["gpu_driver"] == driver
