"""Turns a recipe into what runs it: a `vllm serve` command or a Python snippet.

A recipe is proven for one engine. Another engine gets it only where every reader of the cache sees the
same numbers (K and V in the model's own 16-bit type); a lossy codec of one engine is not the other's, so
it is refused with the command that would prove one there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvtune.adapters.vllm_install import knob_flags
from kvtune.config import format_layer_codecs, parse_bytes
from kvtune.errors import InputFileError, UsageError
from kvtune.model_folder import has_tokenizer
from kvtune.printable import one_line, printable
from kvtune.recipe import Recipe

__all__ = ["TARGETS", "Emission", "check_flags", "emit_recipe"]

_LOSSLESS_VLLM = ("auto", "bfloat16", "float16")
_LOSSLESS_OURS = ("bf16", "fp16", "fp32")
KERNEL_BLOCK = 16
MAX_WORD = 4096
_PYTHON = re.compile(r"python[0-9.]*")
_API_SERVER = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
_REFUSED_FLAGS = ("--trust-remote-code", "--host", "--allow", "--middleware", "--tool-parser-plugin",
                  "--reasoning-parser-plugin", "--logits-processors", "--worker", "--api-key", "--config",
                  "--hf-token", "--enable-ssl", "--uds", "--root-path")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """`text` is what to paste; `command` its words (None for Python); `warnings` stand in it as comments."""

    target: str
    text: str
    command: tuple[str, ...] | None
    warnings: tuple[str, ...] = ()


def emit_recipe(recipe: Recipe, path: Path, target: str) -> Emission:
    """`recipe` (read from `path`) for `target`. UsageError where it cannot be carried over, saying why."""
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    return TARGETS[target](recipe, path)


def check_flags(command: Sequence[str], known: Sequence[str], version: str) -> None:
    """UsageError naming the first flag that an installed vLLM does not have."""
    for word in command:
        if word.startswith("--") and word not in known:
            raise UsageError(f"vLLM {version} has no {word}; run `kvtune tune --engine vllm` with it again")


# -- vLLM --


def _emit_vllm(recipe: Recipe, _path: Path) -> Emission:
    if recipe.engine["name"] == "vllm":
        knobs, warnings = recipe.knobs, _verdict_warnings(recipe)
        model = _model(recipe)
        launcher = _launcher(recipe, model)
        flags = _words(recipe, "flags", _engine_flags(recipe))
        _check_unattended(flags)
        if "-m" in launcher:
            warnings.append("this build has no working `vllm` command, so its API server module is started")
    else:
        knobs, warnings = _carry_to_vllm(recipe)
        launcher, flags = ["vllm", "serve", _model(recipe)], _engine_flags(recipe)
    command = [*launcher, *knob_flags(knobs), *_budget_flags(recipe), *flags]
    _check_words(command)
    return Emission(
        target="vllm",
        text=_header(recipe, "vLLM", warnings) + _shell(command),
        command=tuple(command),
        warnings=tuple(warnings),
    )


def _launcher(recipe: Recipe, model: str) -> list[str]:
    """The words before the flags, as `tune` recorded them; a recipe that starts anything else is refused."""
    words = _words(recipe, "launcher", ["vllm", "serve", model])
    is_command = len(words) == 3 and Path(words[0]).name == "vllm" and words[1] == "serve"
    is_module = len(words) == 5 and _PYTHON.fullmatch(Path(words[0]).name) and words[1:4] == _API_SERVER
    if not (is_command or is_module) or words[-1].startswith("-"):
        raise InputFileError(
            f"the recipe's engine.launcher {one_line(' '.join(words), 80)!r} does not start vLLM; "
            "run `kvtune tune --engine vllm` again"
        )
    return words


def _words(recipe: Recipe, name: str, default: list[str]) -> list[str]:
    found = recipe.engine.get(name)
    if not found:
        return default
    if not isinstance(found, list) or not all(isinstance(w, str) for w in cast("list[Any]", found)):
        raise InputFileError(f"the recipe's engine.{name} must be a list of words")
    return cast("list[str]", found)


def _check_unattended(flags: Sequence[str]) -> None:
    """InputFileError for a flag that runs code from elsewhere or opens the server: nobody proves those."""
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if any(name.startswith(refused) for refused in _REFUSED_FLAGS):
            raise InputFileError(
                f"the recipe's engine.flags hold {one_line(name, 60)!r}, which kvtune never sets; "
                "add it by hand if you mean it"
            )


def _check_words(command: Sequence[str]) -> None:
    """InputFileError for a word that would not look on a screen like what it is."""
    for word in command:
        if printable(word) != word or "\n" in word or len(word) > MAX_WORD:
            raise InputFileError(
                f"the recipe's command holds {one_line(word, 80)!r}: no word of it may hold control "
                f"characters or be longer than {MAX_WORD}"
            )


def _carry_to_vllm(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """Our engine's knobs as vLLM's; only the lossless ones have an equal there."""
    _require_own(recipe)
    cache = recipe.configuration["cache"]
    table = format_layer_codecs(recipe.cache_config().layer_codecs)
    if table:
        raise UsageError(
            f"this recipe gives layers codecs of their own ({table}); vLLM has one KV cache dtype for all. "
            f"Emit --target transformers, or prove one for vLLM: "
            f"kvtune tune {_model(recipe)} --workload FILE --engine vllm"
        )
    codecs = _own_codecs(cache)
    if not codecs <= set(_LOSSLESS_OURS):
        stored = " and ".join(sorted(codecs))
        raise UsageError(
            f"this recipe stores K and V as {stored}, proven with kvtune's codecs; vLLM has no equal of "
            f"them. Emit --target transformers, or prove its own: "
            f"kvtune tune {_model(recipe)} --workload FILE --engine vllm"
        )
    knobs: dict[str, Any] = {"kv_dtype": "auto"}
    shared = ("block_size", "enable_prefix_caching", "max_num_seqs", "max_num_batched_tokens")
    knobs |= {name: recipe.knobs[name] for name in shared if name in recipe.knobs}
    warnings = _verdict_warnings(recipe)
    warnings.append("measured on kvtune's engine, not on vLLM: answers stay, speed is not proven here")
    warnings.append("vLLM on CPU takes blocks of 32 tokens and up; its own default is 128")
    return knobs, warnings


def _budget_flags(recipe: Recipe) -> list[str]:
    budget = recipe.configuration["cache"].get("kv_budget")
    return [] if budget is None else ["--kv-cache-memory-bytes", str(parse_bytes(budget))]


def _engine_flags(recipe: Recipe) -> list[str]:
    engine = recipe.configuration["engine"]
    names = (("dtype", "--dtype"), ("max_model_len", "--max-model-len"))
    return [word for key, flag in names if engine.get(key) is not None for word in (flag, str(engine[key]))]


def _shell(words: Sequence[str]) -> str:
    """One flag with its value per line, so that a diff of two commands reads well."""
    lines: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if not lines or (word.startswith("--") and word != "--model"):
            lines.append(quoted)
        else:
            lines[-1] += " " + quoted
    return " \\\n  ".join(lines) + "\n"


# -- Transformers --


def _emit_transformers(recipe: Recipe, path: Path) -> Emission:
    """Our engine over the Transformers model: what can hold a recipe's codecs there."""
    warnings = _verdict_warnings(recipe)
    if recipe.engine["name"] == "kvtune":
        build = f"engine = Engine.from_recipe({str(path.resolve())!r})"
        names = "Engine, SamplingParams"
    else:
        names = "CacheConfig, Engine, SamplingParams, SchedulerConfig"
        build = _carried_engine(recipe, warnings)
    folder = Path(_model(recipe))
    takes_text = not folder.is_dir() or has_tokenizer(folder)
    prompts, shown = ('["Hello"]', "text") if takes_text else ("[[1, 2, 3]]", "token_ids")
    snippet = (
        f"from kvtune import {names}\n\n"
        f"{build}\n"
        f"outputs = engine.generate({prompts}, SamplingParams(max_tokens=64, temperature=0.0))\n"
        f"print(outputs[0].{shown})\n"
    )
    text = _header(recipe, "kvtune over Transformers", warnings) + snippet
    return Emission(target="transformers", text=text, command=None, warnings=tuple(warnings))


def _carried_engine(recipe: Recipe, warnings: list[str]) -> str:
    knobs = recipe.knobs
    kv_dtype = knobs.get("kv_dtype", "auto")
    if recipe.engine["name"] != "vllm" or kv_dtype not in _LOSSLESS_VLLM:
        raise UsageError(
            f"this recipe stores the cache as {kv_dtype} in {recipe.engine['name']}, which kvtune over "
            f"Transformers has no equal of; prove its codecs: kvtune tune {_model(recipe)} --engine kvtune"
        )
    cache: dict[str, Any] = {"enable_prefix_caching": knobs.get("enable_prefix_caching", True)}
    if "kv_budget" in recipe.configuration["cache"]:
        cache["kv_budget"] = recipe.configuration["cache"]["kv_budget"]
    block_size = int(knobs.get("block_size", KERNEL_BLOCK))
    cache["block_size"] = -(-block_size // KERNEL_BLOCK) * KERNEL_BLOCK
    if cache["block_size"] != block_size:
        warnings.append(
            f"block size {block_size} is no multiple of {KERNEL_BLOCK}; {cache['block_size']} here"
        )
    scheduler = {k: knobs[k] for k in ("max_num_seqs", "max_num_batched_tokens") if k in knobs}
    warnings.append("measured on vLLM, not on kvtune's engine: answers stay, speed is not proven here")
    return (
        f"engine = Engine.from_pretrained(\n    {_model(recipe)!r},\n"
        f"    cache=CacheConfig({_keywords(cache)}),\n"
        f"    scheduler=SchedulerConfig({_keywords(scheduler)}),\n)"
    )


def _keywords(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


# -- both --


def _own_codecs(cache: Mapping[str, Any]) -> set[str]:
    return {str(cache.get("k_codec", "bf16")), str(cache.get("v_codec", "bf16"))}


def _require_own(recipe: Recipe) -> None:
    if recipe.engine["name"] != "kvtune":
        raise UsageError(
            f"this recipe is for engine {recipe.engine['name']!r}; kvtune cannot emit it for vLLM"
        )


def _model(recipe: Recipe) -> str:
    """Path or repository id; UsageError if the recipe names neither."""
    for key in ("path", "repo", "id", "name"):
        if recipe.model.get(key):
            return str(recipe.model[key])
    raise UsageError("this recipe names no model path; run `kvtune tune` again")


def _verdict_warnings(recipe: Recipe) -> list[str]:
    if recipe.verdict == "PASS":
        return []
    return [f"the quality verdict of this recipe is {recipe.verdict}, not PASS"]


def _header(recipe: Recipe, what: str, warnings: Sequence[str]) -> str:
    engine = f"{recipe.engine['name']} {recipe.engine.get('version') or 'of unknown version'}"
    made = recipe.created_at or "unknown date"
    lines = [
        f"{what}, from a kvtune recipe of {made} ({recipe.content_sha256[:12]})",
        f"measured with {engine}; verdict {recipe.verdict}, read contract {recipe.read_contract}",
        *(f"warning: {warning}" for warning in warnings),
    ]
    return "".join(f"# {one_line(line, 300)}\n" for line in lines)


TARGETS = {"vllm": _emit_vllm, "transformers": _emit_transformers}
"""Target name -> what turns a recipe into it."""
