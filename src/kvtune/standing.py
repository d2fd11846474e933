"""Whether what a recipe was proven on is still here: each recorded fact beside the one found now.

| a difference in | means |
|---|---|
| weights, config, tokenizer, chat template, read contract, codecs, kernel path or its numbers | changed |
| kvtune, torch, transformers: major or minor version | changed; a patch is noted |
| vLLM: version, platform, attention backend, model dtype | changed: its kernels are out of sight from here |
| GPU or its driver, where the recipe's engine runs on it | changed |
| CPU, cores, threads, memory | noted: they bear on speed; changed where the recipe was chosen by an SLO |
| Python, kernel library with the same numbers, generation config | noted |

`changed` and what must be known but is not recorded keep a recipe from standing; what is noted does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

from kvtune.errors import UsageError
from kvtune.printable import one_line
from kvtune.recipe import Recipe, codec_constants_sha256
from kvtune.spec import codec_storage

__all__ = ["VALID_DAYS", "Fact", "accepted", "age_fact", "engine_standing", "hardware_standing",
           "model_standing", "recipe_standing", "used_codecs", "verdict_of"]  # fmt: skip

VALID_DAYS: Final = 90
"""How long a recipe speaks for traffic nobody compared again."""
_ROUNDING: Final = 1e-5
"""Of the largest attention output: what another CPU's matrix product may differ by on the same path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing a recipe rests on. `verdict`: same | noted | changed | unclear | unseen | missing | accepted.

    unclear: it cannot be told (not recorded, too little given); unseen: nobody asked; missing: what it
    takes to look is not installed here.
    """

    name: str
    proven: str
    found: str
    verdict: str
    why: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def verdict_of(facts: Sequence[Fact]) -> str:
    """FAIL if anything changed, UNDECIDED if anything that matters could not be told, else PASS."""
    found = {fact.verdict for fact in facts}
    if "changed" in found:
        return "FAIL"
    return "UNDECIDED" if found & {"unclear", "missing"} else "PASS"


def accepted(facts: Sequence[Fact], names: Sequence[str]) -> list[Fact]:
    """Facts with the named ones (or groups: `hardware`) accepted; UsageError for a name that nothing has."""
    for name in names:
        if not any(_is_named(fact, name) for fact in facts):
            known = ", ".join(sorted({fact.name for fact in facts}))
            raise UsageError(f"--accept {name!r} names nothing that was checked; known: {known}")
    harmful = ("changed", "unclear", "missing")
    return [
        replace(fact, verdict="accepted")
        if fact.verdict in harmful and any(_is_named(fact, name) for name in names) else fact
        for fact in facts
    ]  # fmt: skip


def _is_named(fact: Fact, name: str) -> bool:
    return fact.name == name or fact.name.startswith(f"{name}.")


# -- the recipe itself --


def recipe_standing(recipe: Recipe) -> list[Fact]:
    """What was proven at all, and under which codec constants."""
    verdict = recipe.verdict
    proven = recipe.quality.get("proven")
    fact = Fact(
        name="recipe.verdict", proven="PASS", found=verdict,
        verdict="same" if verdict == "PASS" else "changed",
        why="" if verdict == "PASS" else "only a PASS is proven; run `kvtune tune` again",
    )  # fmt: skip
    if fact.verdict == "same" and proven is False:
        fact = replace(fact, verdict="noted", why="on synthetic text, so nothing is proven about answers")
    return [fact, *_squeeze(recipe)]


def _squeeze(recipe: Recipe) -> list[Fact]:
    """Whether the low planes that may go were judged with all of them gone."""
    if recipe.engine["name"] != "kvtune" or not recipe.cache_config().squeeze_planes:
        return []
    name, proof = "recipe.squeeze", _member(recipe.quality, "squeeze")
    if not proof:
        why = "nothing says that low planes may go; run `kvtune tune --squeeze` again"
        return [Fact(name=name, proven="not recorded", found="", verdict="unclear", why=why)]
    verdict = _shown(proof.get("verdict"))
    fact = Fact(name=name, proven="PASS", found=verdict, verdict="same")
    if verdict != "PASS":
        why = "only a PASS is proven; run `kvtune tune --squeeze` again"
        return [replace(fact, verdict="changed", why=why)]
    if proof.get("proven") is False:
        fact = replace(fact, verdict="noted", why="on synthetic text, so nothing is proven about answers")
    return [fact]


def age_fact(recipe: Recipe, now: datetime, *, is_traffic_compared: bool) -> Fact:
    """Past its time a recipe stands only if today's traffic was compared."""
    name = "recipe.age"
    try:
        made = datetime.fromisoformat(recipe.created_at)
        made = made if made.tzinfo else made.replace(tzinfo=UTC)
        days = (now - made) / timedelta(days=1)
    except (ValueError, OverflowError):
        return Fact(
            name=name, proven="not recorded", found="", verdict="noted", why="nothing says how old it is"
        )
    found, limit = f"{max(0.0, days):.0f} days", f"valid {VALID_DAYS} days"
    if days < -1:
        return Fact(
            name=name, proven=limit, found=found, verdict="noted", why="made in the future: see the clock"
        )
    if days <= VALID_DAYS or is_traffic_compared:
        why = "" if days <= VALID_DAYS else "past its time, but today's traffic was compared"
        return Fact(name=name, proven=limit, found=found, verdict="same", why=why)
    why = "traffic moves: compare today's with --workload, or run `kvtune tune` again"
    return Fact(name=name, proven=limit, found=found, verdict="changed", why=why)


# -- model --

_MODEL: Final = (
    ("weights", "weights_sha256", "changed"), ("config", "config_sha256", "changed"),
    ("tokenizer", "tokenizer_sha256", "changed"), ("chat_template", "chat_template_sha256", "changed"),
    ("generation_config", "generation_config_sha256", "noted"), ("revision", "revision", "noted"),
)  # fmt: skip
_OPTIONAL: Final = frozenset(("chat_template", "generation_config", "revision"))
"""Recipes of earlier versions lack them."""


def model_standing(recipe: Recipe, now: Mapping[str, Any]) -> list[Fact]:
    """`now`: digests of the folder as `kvtune.model_folder.model_digests` gives them."""
    facts: list[Fact] = []
    for name, key, on_change in _MODEL:
        if name == "revision" and (recipe.model.get(key) is None or now.get(key) is None):
            continue
        missing = "noted" if name in _OPTIONAL else "unclear"
        facts.append(_equal(f"model.{name}", recipe.model, now, key, on_change=on_change, missing=missing))
    return facts


def _equal(
    name: str,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    key: str,
    *,
    on_change: str,
    missing: str = "noted",
) -> Fact:
    found = now.get(key)
    if key not in then:
        why = "the recipe does not record it; run `kvtune tune` again"
        return Fact(name=name, proven="not recorded", found=_shown(found), verdict=missing, why=why)
    is_same = then[key] == found
    return Fact(
        name=name, proven=_shown(then[key]), found=_shown(found), verdict="same" if is_same else on_change
    )


def _shown(value: Any) -> str:
    """A fact as text: digests shortened, nothing as `none`."""
    if value is None or value == "":
        return "none"
    if isinstance(value, list):
        return one_line(", ".join(_shown(item) for item in cast("list[Any]", value)[:8]), 60)
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,64}", text) else one_line(text, 60)


# -- engine --


def used_codecs(recipe: Recipe) -> list[str]:
    """Codecs that the recipe stores keys or values in, those of single layers included."""
    cache = recipe.cache_config()
    pairs = [(cache.k_codec, cache.v_codec), *cache.layer_codecs.values()]
    return sorted({codec for pair in pairs for codec in pair})


def engine_standing(recipe: Recipe, now: Mapping[str, Any]) -> list[Fact]:
    """`now`: facts of the engine as the recipe's `engine` member records them."""
    return _own_engine(recipe, now) if recipe.engine["name"] == "kvtune" else _foreign_engine(recipe, now)


def _foreign_engine(recipe: Recipe, now: Mapping[str, Any]) -> list[Fact]:
    facts = [
        _equal(f"engine.{key}", recipe.engine, now, key, on_change="changed", missing="unclear")
        for key in ("version", "platform", "attention_backend")
    ]
    facts += [
        _equal(f"engine.{key}", recipe.engine, now, key, on_change="noted")
        for key in ("torch", "transformers")
    ]
    return [*facts, _equal("engine.dtype", recipe.model, now, "dtype", on_change="changed")]


def _own_engine(recipe: Recipe, now: Mapping[str, Any]) -> list[Fact]:
    facts = [_version(f"engine.{name}", recipe.engine.get(key), now.get(key)) for name, key in (
        ("kvtune", "version"), ("torch", "torch"), ("transformers", "transformers"))]  # fmt: skip
    facts.append(_equal("engine.python", recipe.engine, now, "python", on_change="noted"))
    then = {"contract": recipe.read_contract, "constants": recipe.codec_constants_sha256}
    here = {"contract": now.get("read_contract"), "constants": codec_constants_sha256()}
    facts.append(_equal("engine.read_contract", then, here, "contract", on_change="changed"))
    facts.append(_equal("codecs.layout", then, here, "constants", on_change="changed"))
    attention = _attention(recipe, now)
    return [*facts, *_codecs(recipe, now), *_kernel(recipe, now, attention), attention]


def _version(name: str, then: Any, now: Any) -> Fact:
    if not isinstance(then, str) or not then:
        return Fact(name=name, proven="not recorded", found=_shown(now), verdict="unclear",
                    why="the recipe does not record it; run `kvtune tune` again")  # fmt: skip
    verdict = "same" if then == now else "noted" if _release(then) == _release(str(now)) else "changed"
    return Fact(name=name, proven=_shown(then), found=_shown(now), verdict=verdict)


def _release(version: str) -> tuple[str, ...]:
    """Major and minor version; the whole text where that is no version."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?=[.+a-z]|$)", version)
    return (version,) if match is None else match.groups()


def _codecs(recipe: Recipe, now: Mapping[str, Any]) -> list[Fact]:
    """Digests of what each codec in use encodes and decodes; constants show whatever the version says."""
    then, here = (_member(side, "behaviour", "codecs") for side in (recipe.engine, now))
    facts = [
        _equal(f"codecs.{name}", then, here, name, on_change="changed", missing="unclear")
        for name in used_codecs(recipe)
    ]
    then, here = (_member(side, "behaviour") for side in (recipe.engine, now))
    return [*facts, _equal("codecs.rotation", then, here, "rotation", on_change="changed", missing="unclear")]


def _kernel(recipe: Recipe, now: Mapping[str, Any], attention: Fact) -> list[Fact]:
    then, here = _member(recipe.engine, "kernel"), _member(now, "kernel")
    path = _equal(
        "kernel.path", {"path": recipe.kernel} if recipe.kernel else {}, here, "path", on_change="changed",
        missing="unclear",
    )  # fmt: skip
    facts = [path, _equal("kernel.isa", then, here, "isa", on_change="changed", missing="unclear")]
    library = _equal("kernel.library", then, here, "library_sha256", on_change="noted", missing="unclear")
    if library.verdict == "noted" and attention.verdict == "same":
        library = replace(library, why="rebuilt; its numbers are the same")
    return [*facts, library]


def _attention(recipe: Recipe, now: Mapping[str, Any]) -> Fact:
    """Outputs over a fixed cache, the worst of the codecs in use (their single-plane reads included)."""
    name = "kernel.numbers"
    then, here = (_member(side, "behaviour", "attention") for side in (recipe.engine, now))
    worst, worst_codec = 0.0, ""
    for codec in used_codecs(recipe):
        for key in (codec, f"{codec}, 1 plane") if codec_storage(codec).low_bits else (codec,):
            if key not in here:
                return Fact(name=name, proven="recorded", found=f"none over {key}", verdict="changed")
            distance = _distance(then.get(key), here[key])
            if distance is None:
                return Fact(name=name, proven="not recorded", found="", verdict="unclear",
                            why="the recipe does not record it; run `kvtune tune` again")  # fmt: skip
            if distance > worst:
                worst, worst_codec = distance, key
    if not worst:
        return Fact(name=name, proven="recorded", found="equal", verdict="same")
    verdict = "noted" if worst <= _ROUNDING else "changed"
    return Fact(name=name, proven="recorded", found=f"{worst:.1e} apart", verdict=verdict,
                why=f"attention over {worst_codec}, of its largest output")  # fmt: skip


def _distance(then: Any, now: Sequence[float]) -> float | None:
    """Largest difference over the largest value; None unless both are as many finite numbers."""
    if not isinstance(then, list) or len(cast("list[Any]", then)) != len(now):
        return None
    values = cast("list[Any]", then)
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e30 for x in values):
        return None
    largest = max(abs(x) for x in now)
    apart = max(abs(a - b) for a, b in zip(values, now, strict=True))
    return 0.0 if apart == 0 else apart / largest if largest > 0 else math.inf


def _member(data: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A member of a member; empty where the file has something else there."""
    found: Any = data
    for name in names:
        found = cast("Mapping[str, Any]", found).get(name) if isinstance(found, Mapping) else None
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


# -- machine --


def hardware_standing(recipe: Recipe, now: Mapping[str, Any]) -> list[Fact]:
    """CPU and memory bear on speed alone: they count where the recipe was chosen by an SLO."""
    on_change = "changed" if _member(recipe.provenance, "objective").get("slo") else "noted"
    facts = [
        _equal(f"hardware.{key}", recipe.hardware, now, key, on_change=on_change)
        for key in ("system", "cpu", "num_cpus", "threads") if key in recipe.hardware or key == "cpu"
    ]  # fmt: skip
    facts.append(_memory(recipe.hardware.get("memory_bytes"), now.get("memory_bytes"), on_change))
    is_on_gpu = bool(recipe.hardware.get("gpus")) and recipe.engine.get("platform") not in (None, "cpu")
    for key in ("gpus", "gpu_driver"):
        if recipe.hardware.get(key) or now.get(key):
            facts.append(_equal(f"hardware.{key}", recipe.hardware, now, key,
                                on_change="changed" if is_on_gpu else "noted"))  # fmt: skip
    why = "speed was measured elsewhere; the answers' proof does not rest on it"
    return [replace(f, why=why) if f.verdict == "noted" and not f.why else f for f in facts]


def _memory(then: Any, now: Any, on_change: str) -> Fact:
    """Within a tenth is the same: hosts differ in what they keep for themselves."""
    numbers = [
        x for x in (then, now) if isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 2**60
    ]
    shown = [f"{x / 2**30:.1f} GiB" for x in numbers]
    if len(numbers) < 2:
        return Fact(name="hardware.memory", proven="not recorded", found="", verdict="noted")
    is_same = abs(numbers[1] / numbers[0] - 1) <= 0.1
    return Fact(
        name="hardware.memory", proven=shown[0], found=shown[1], verdict="same" if is_same else on_change
    )
