"""`kvtune emit`: print the command or the snippet that runs a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli.screen import say

__all__ = ["emit"]


def emit(
    recipe: Annotated[Path, typer.Argument(help="recipe.json written by `kvtune tune`", show_default=False)],
    target: Annotated[str, typer.Option("--target", help="vllm | transformers", show_default=False)],
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="Check the flags against the vLLM of this Python.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the command or the snippet that runs a recipe."""
    from kvtune.adapters.emit import check_flags, emit_recipe
    from kvtune.recipe import Recipe

    found = Recipe.load(recipe)
    emission = emit_recipe(found, recipe, target)
    warnings = list(emission.warnings)
    if vllm_python is not None and emission.command is not None:
        from kvtune.adapters.vllm_install import VLLMInstall

        offer = VLLMInstall.locate(vllm_python).ask(
            Path(str(found.model.get("path", ""))), {"enforce_eager": True}
        )
        check_flags(emission.command, offer.flags, offer.version)
        measured = found.engine.get("version")
        if found.engine["name"] == "vllm" and measured != offer.version:
            warnings.append(
                f"measured with vLLM {measured}, this is {offer.version}: run `kvtune check` first"
            )
    if as_json:
        print(json.dumps({
            "schema_version": 1,
            "target": emission.target,
            "engine": found.engine["name"],
            "verdict": found.verdict,
            "command": None if emission.command is None else list(emission.command),
            "text": emission.text,
            "warnings": warnings,
        }))  # fmt: skip
        return
    for warning in warnings[len(emission.warnings) :]:
        say(f"kvtune: warning: {warning}", is_aside=True)
    say(emission.text, end="")
