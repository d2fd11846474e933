"""A model folder on disk: its config, its files, and the digests that identify it. No torch.

Both engines and the recipe use these digests, so a recipe proven on one names the same model on the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from kvtune.errors import InputFileError

__all__ = [
    "config_sha256",
    "files_sha256",
    "has_tokenizer",
    "read_config",
    "tokenizer_sha256",
    "weight_files",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json. InputFileError when it is absent or not one JSON object."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputFileError(f"{folder} is no model folder: config.json not found") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputFileError(f"cannot read {file}: {error}") from error
    if not isinstance(raw, dict):
        raise InputFileError(f"{file} must hold one JSON object, found {type(raw).__name__}")
    return cast("dict[str, Any]", raw)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in name order; InputFileError when there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputFileError(f"{folder} holds no *.safetensors file; convert the weights to safetensors")
    return files


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def files_sha256(files: Sequence[Path]) -> str:
    """SHA-256 over (name, content digest) of each file, streamed."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            content = hashlib.file_digest(stream, "sha256")
        total.update(file.name.encode() + b"\0" + content.digest())
    return total.hexdigest()


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config dict without the members that do not change the model's meaning."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_sha256(folder: Path) -> str | None:
    """SHA-256 over the tokenizer's files; None for a folder without one."""
    files = sorted(folder / name for name in TOKENIZER_FILES if (folder / name).exists())
    return files_sha256(files) if files else None
