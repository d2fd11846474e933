"""A benchmark of one model that stands for claims: how it begins and how it ends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvtune.errors import KVTuneError
from kvtune.testing.reference import reference_model_path

__all__ = ["run_claims"]


def run_claims(
    name: str, parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict[str, Any]]
) -> int:
    """Parse, run, write the JSON asked for, say which of its `checks` held. Returns 1 where one did not.

    Adds what such benchmarks share: the model (by default the reference model), threads, seed, JSON. What
    kvtune refuses ends the process with one line.
    """
    parser.add_argument("model", type=Path, nargs="?", help="model folder; default the reference model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.model = args.model or reference_model_path()
    try:
        result = run(args)
    except KVTuneError as error:
        sys.exit(f"{name}: {error}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for claim, is_held in result["checks"].items():
        print(f"{'held  ' if is_held else 'FAILED'} {claim}")
    print(f"{result['seconds']:.0f} s", flush=True)
    return 0 if all(result["checks"].values()) else 1
