"""What a recipe of our engine rests on besides the model: versions, kernels, codecs, machine. No weights."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

from kvtune._version import __version__
from kvtune.codecs.behaviour import codec_behaviour
from kvtune.config import EngineConfig
from kvtune.engine.identity import READ_CONTRACT
from kvtune.host import read_host
from kvtune.kernels import choose_backend
from kvtune.kernels.native import library_path
from kvtune.model_folder import files_sha256

__all__ = ["engine_facts", "hardware_facts"]


def engine_facts(config: EngineConfig) -> dict[str, Any]:
    """Name, versions, read contract, the kernel path these settings take here, and what codecs and kernels
    do (`kvtune.codecs.behaviour`). HostError where the kernel asked for cannot be had."""
    backend = choose_backend(config.kernel)
    library = library_path() if backend.library is not None else None
    return {
        "name": "kvtune", "version": __version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "cuda": torch.version.cuda or "none: torch's CPU build",
        "python": platform.python_version(),
        "read_contract": READ_CONTRACT,
        "kernel": {
            "path": backend.name, "isa": backend.isa,
            "library_sha256": None if library is None else files_sha256([library]),
        },
        "behaviour": codec_behaviour(backend),
    }  # fmt: skip


def hardware_facts(config: EngineConfig) -> dict[str, Any]:
    """This machine and the threads the engine takes on it."""
    return {
        **read_host().to_dict(),
        "logical_cores": os.cpu_count(),
        "threads": config.num_threads or torch.get_num_threads(),
    }
