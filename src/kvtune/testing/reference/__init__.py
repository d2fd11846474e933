"""The reference model: a small Llama whose answers need its context (see model/README.md)."""

from __future__ import annotations

from pathlib import Path

from kvtune.errors import HostError

__all__ = ["reference_model_path"]


def reference_model_path() -> Path:
    """Folder of the bundled model, as `transformers` loads it. HostError if it was not installed."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise HostError(f"the reference model is missing: no weights in {folder}; reinstall kvtune")
    return folder
