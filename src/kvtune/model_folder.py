"""A model folder on disk: its config, its files, and the digests that identify it. No torch.

Both engines and the recipe use these digests, so a recipe proven on one names the same model on the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from kvtune.errors import InputFileError

__all__ = [
    "chat_template_sha256",
    "config_sha256",
    "files_sha256",
    "has_tokenizer",
    "hub_repo",
    "model_digests",
    "read_config",
    "tokenizer_sha256",
    "weight_dtypes",
    "weight_files",
]

MAX_HEADER_BYTES = 100 * 2**20
"""What safetensors allows."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TOKENIZER_PARTS = (
    *TOKENIZER_FILES, "merges.txt", "vocab.txt", "spiece.model", "added_tokens.json",
    "special_tokens_map.json",
    "tekken.json",
)  # fmt: skip
"""Files that change what a text's tokens are; one of the first four at least makes a tokenizer."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


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
    if not has_tokenizer(folder):
        return None
    return files_sha256(sorted(folder / name for name in TOKENIZER_PARTS if (folder / name).is_file()))


def chat_template_sha256(folder: Path) -> str | None:
    """SHA-256 over every chat template, in files of its own or in tokenizer_config.json; None without one."""
    files = [folder / name for name in TEMPLATE_FILES if (folder / name).is_file()]
    files += sorted(file for file in (folder / "additional_chat_templates").glob("*.jinja") if file.is_file())
    inline = _inline_template(folder / "tokenizer_config.json")
    if not files and inline is None:
        return None
    return hashlib.sha256(f"{files_sha256(files)}\0{inline}".encode()).hexdigest()


def _inline_template(file: Path) -> str | None:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever loads the tokenizer will say so
    found = cast("dict[str, Any]", raw).get("chat_template") if isinstance(raw, dict) else None
    return None if found is None else json.dumps(found, sort_keys=True)


def model_digests(folder: Path, *, weights_sha256: str | None = None) -> dict[str, str | None]:
    """Everything a recipe identifies a model folder by; reads the weights (seconds per 10 GB) unless their
    digest is given.

    `revision`: the commit of a Hugging Face cache snapshot. InputFileError for a folder that is no model.
    """
    revision = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", folder.resolve().as_posix())
    generation = folder / "generation_config.json"
    return {
        "config_sha256": config_sha256(read_config(folder)),
        "weights_sha256": weights_sha256 or files_sha256(weight_files(folder)),
        "tokenizer_sha256": tokenizer_sha256(folder),
        "chat_template_sha256": chat_template_sha256(folder),
        "generation_config_sha256": files_sha256([generation]) if generation.is_file() else None,
        "revision": None if revision is None else revision[1],
    }


def weight_dtypes(folder: Path) -> list[str]:
    """Precisions in which the weights are stored, as the safetensors headers name them (BF16, F32, ...)."""
    found: set[str] = set()
    for file in weight_files(folder):
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        except (OSError, ValueError, RecursionError):
            continue  # whoever loads the weights says what is wrong with them
        if isinstance(header, dict):
            tensors = cast("dict[str, Any]", header)
            found |= {str(t["dtype"]) for t in tensors.values() if isinstance(t, dict) and "dtype" in t}
    return sorted(found)


def hub_repo(folder: Path) -> str | None:
    """`owner/name` of a snapshot folder of a Hugging Face cache; None of any other folder."""
    snapshot = folder.resolve()
    kind, _, name = snapshot.parent.parent.name.partition("--")
    return name.replace("--", "/") if kind == "models" and snapshot.parent.name == "snapshots" else None
