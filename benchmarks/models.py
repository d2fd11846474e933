"""The model of a benchmark and its harder twins, and the head of a record about them."""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from kvtune.testing.variants import VARIANTS, write_variant


def new_record(args: argparse.Namespace) -> dict[str, Any]:
    """Settings and machine; `models` takes what is found for each."""
    return {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "models": {},
    }  # fmt: skip


def model_folders(model: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(name, folder) of "model" itself and of variants by name, written when its turn comes, announced."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = (
                model if name == "model" else write_variant(model, Path(scratch) / name, VARIANTS[name]())
            )
            print(f"\n{name}", flush=True)
            yield name, folder
