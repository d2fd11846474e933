"""The demo's stand-in model: a small Llama trained on the standard library's text (see model/README.md)."""

from __future__ import annotations

from pathlib import Path

from kvtune.errors import HostError

__all__ = ["demo_model_path"]


def demo_model_path() -> Path:
    """Folder of the bundled stand-in model, as `transformers` loads it. HostError if it was not installed."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise HostError(f"the demo needs its bundled model: no weights in {folder}; reinstall kvtune")
    return folder
