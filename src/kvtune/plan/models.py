"""Finding a model's config: a config.json, its folder, or one of the bundled models."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvtune.errors import InputFileError, UsageError

__all__ = ["ModelSource", "bundled_models", "find_model"]

_HERE = Path(__file__).parent
_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model's config dict, where it came from, and the bytes of its weights where they are known.

    `active_parameters`: those that one token meets, None where not known.
    """

    name: str
    config: Mapping[str, Any]
    weights_bytes: int | None = None
    weights_basis: str = ""
    active_parameters: int | None = None


def bundled_models() -> list[str]:
    """Ids of the models that can be planned without any file, e.g. `Qwen/Qwen3-32B`."""
    return sorted(path.stem.replace("--", "/", 1) for path in (_HERE / "configs").glob("*.json"))


def find_model(model: str) -> ModelSource:
    """What MODEL names: a config file, a folder with config.json, or a bundled id (org and case optional).

    InputFileError when the file cannot be read as a config, UsageError with the nearest names when nothing
    is found.
    """
    path = Path(model)
    try:
        path = path.expanduser()
        is_folder, is_file = bool(model) and path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL byte, an unknown ~user
        is_folder = is_file = False
    if is_folder:
        weights, basis = _folder_weights(path)
        config = _read_config(path / "config.json")
        return ModelSource(name=model, config=config, weights_bytes=weights, weights_basis=basis)
    if is_file:
        return ModelSource(name=model, config=_read_config(path))
    return _bundled(model)


def _bundled(model: str) -> ModelSource:
    ids = bundled_models()
    by_key = {key.lower(): name for name in ids for key in (name, name.split("/")[1])}
    name = by_key.get(model.lower())
    if name is None:
        near = difflib.get_close_matches(model.lower(), by_key, n=3, cutoff=0.5)
        hint = ", ".join(dict.fromkeys(by_key[key] for key in near)) or ", ".join(ids)
        shown = model if len(model) <= 200 else model[:200] + "..."
        raise UsageError(
            f"no config file, folder or bundled model {shown!r}; nearest bundled: {hint}; "
            "or pass the path of a config.json"
        )
    facts = json.loads((_HERE / "catalogue.json").read_text(encoding="utf-8"))[name]
    config = _read_config(_HERE / "configs" / f"{name.replace('/', '--')}.json")
    return ModelSource(
        name=name,
        config=config,
        weights_bytes=facts["weights_bytes"],
        weights_basis=f"{facts['parameters']:,} parameters, {facts['basis']}",
        active_parameters=facts["active_parameters"],
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    """A config.json as a dict; InputFileError says what is wrong and where."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InputFileError(f"{path}: larger than {_MAX_CONFIG_BYTES >> 20} MiB: not a model config")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{path}: {error.strerror or error}: expected a model's config.json") from None
    except json.JSONDecodeError as error:
        raise InputFileError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # not UTF-8, an integer of thousands of digits, nesting without end
        raise InputFileError(f"{path}: not a JSON text file: expected a model's config.json") from None
    if not isinstance(value, dict):
        raise InputFileError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return cast(Mapping[str, Any], value)


def _folder_weights(folder: Path) -> tuple[int | None, str]:
    """Bytes of the safetensors files in a model folder (as stored)."""
    files = list(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return (size, f"{len(files)} safetensors file(s)") if size else (None, "")
