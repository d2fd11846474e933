"""Facts about this machine for recipes and `doctor`: CPU and its instruction sets, memory, GPUs. No torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Host", "read_host"]

_ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
              "asimd", "asimddp", "bf16", "i8mm", "sve")  # fmt: skip
"""Instruction sets KV kernels care about, by the kernel's names in /proc/cpuinfo (x86, then Arm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """`num_cpus`: cores this process may use. Memory in bytes, None where the system does not say."""

    cpu: str
    isa: tuple[str, ...]
    num_cpus: int
    memory_bytes: int | None
    available_memory_bytes: int | None
    gpus: tuple[str, ...]
    system: str
    gpu_driver: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a recipe records: no figure that changes from minute to minute."""
        facts = asdict(self)
        facts.pop("available_memory_bytes")
        return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def read_host() -> Host:
    """Read /proc and, if there is one, nvidia-smi (at most a few seconds)."""
    cpuinfo = _fields(Path("/proc/cpuinfo"))
    memory = _fields(Path("/proc/meminfo"))
    gpus, driver = _nvidia_gpus()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return Host(
        cpu=cpuinfo.get("model name") or platform.processor() or platform.machine(),
        isa=tuple(flag for flag in _ISA_FLAGS if flag in flags),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_kibibytes(memory.get("MemTotal")),
        available_memory_bytes=_kibibytes(memory.get("MemAvailable")),
        gpus=gpus,
        system=f"{platform.system()} {platform.machine()}",
        gpu_driver=driver,
    )


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines; the first of each name (cpuinfo repeats itself per core)."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _kibibytes(text: str | None) -> int | None:
    number = (text or "").split(" ")[0]
    return int(number) * 1024 if number.isdigit() else None


def _nvidia_gpus() -> tuple[tuple[str, ...], str | None]:
    """(`name, memory` of each NVIDIA GPU, the driver's version)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), None
    query = [tool, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        reply = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return (), None
    rows = [line.partition(", ") for line in reply.stdout.splitlines() if line.strip()]
    if reply.returncode or not rows:
        return (), None
    return tuple(gpu.strip() for _, _, gpu in rows), rows[0][0].strip() or None
