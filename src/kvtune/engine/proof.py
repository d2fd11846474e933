"""Whether a recipe still speaks for what is here: refuse what changes answers, warn of what may.

The kernel path and the version are no reason to refuse: every kernel is held to the reference within
rounding, and a recipe must survive an update long enough to be checked again.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from kvtune._version import __version__
from kvtune.engine.identity import READ_CONTRACT
from kvtune.engine.load import LoadedModel
from kvtune.errors import UsageError
from kvtune.kernels import Backend
from kvtune.recipe import Recipe, codec_constants_sha256

__all__ = ["check_readable", "check_weights", "warn_if_unproven"]


def check_readable(recipe: Recipe, path: str | Path) -> None:
    """UsageError unless this engine stores and reads KV as the recipe's did."""
    if recipe.read_contract != READ_CONTRACT:
        raise UsageError(
            f"recipe {path} was proven under read contract {recipe.read_contract!r}, this engine has "
            f"{READ_CONTRACT}; run `kvtune tune` again"
        )
    if recipe.codec_constants_sha256 != codec_constants_sha256():
        raise UsageError(
            f"recipe {path} was proven with codec constants {recipe.codec_constants_sha256[:12]}, this "
            f"kvtune has {codec_constants_sha256()[:12]}; run `kvtune tune` again"
        )


def check_weights(recipe: Recipe, path: str | Path, loaded: LoadedModel) -> None:
    """UsageError for other weights than those the recipe was proven with."""
    proven = recipe.model.get("weights_sha256")
    if proven is not None and proven != loaded.weights_sha256:
        raise UsageError(
            f"recipe {path} was proven for weights {str(proven)[:12]}, found "
            f"{loaded.weights_sha256[:12]}; run `kvtune tune` for this model"
        )


def warn_if_unproven(recipe: Recipe, path: str | Path, backend: Backend) -> None:
    """A UserWarning for a kernel path or a version that is not the one the recipe was proven with."""
    version = recipe.engine.get("version")
    found: list[str] = []
    if recipe.kernel and recipe.kernel != backend.name:
        found.append(f"kernel path {recipe.kernel}, here it is {backend.reason}")
    if version is not None and version != __version__:
        found.append(f"kvtune {version}, this is {__version__}")
    for difference in found:
        message = f"recipe {path} was proven with {difference}; `kvtune check` judges it again"
        warnings.warn(message, UserWarning, stacklevel=3)  # seen where Engine.from_recipe was called
