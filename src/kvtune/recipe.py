"""The recipe: the configuration `tune` proved, as one JSON file that carries its evidence.

Owns the file format: schema, content hash, atomic writing, and the typed refusal of hostile files.
Knows nothing of how a recipe is found (`tune`) or run (`engine`, `emit`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.errors import InputFileError, UsageError
from kvtune.recipe_settings import check_foreign, check_settings, configuration_of, short
from kvtune.spec import BLOCK_ALIGN, CODEC_STORAGE

__all__ = [
    "SCHEMA_VERSION",
    "Recipe",
    "canonical_json",
    "codec_constants_sha256",
    "configuration_of",
    "write_atomically",
]

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 * 2**20
"""A recipe is some kilobytes; anything far larger is not one, and is not read into memory."""

VERDICTS = ("PASS", "FAIL", "UNDECIDED", "INERT")

DEFAULT_VOIDED_BY = (
    "another model revision, config, tokenizer or weights",
    "another engine version, kernel path or read contract",
    "other codec constants or per-layer codecs",
    "other hardware (speed part only)",
    "traffic outside the strata covered",
)


def canonical_json(data: Any) -> str:
    """The one text a value has: sorted keys, no spaces, ASCII, no NaN (ValueError)."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def codec_constants_sha256() -> str:
    """Hash of the stored bits of every codec: bytes written under other constants cannot be read."""
    rows = [[c.name, c.code_bits, c.strip_values, c.low_bits, c.is_rotated] for c in CODEC_STORAGE.values()]
    return hashlib.sha256(canonical_json([BLOCK_ALIGN, sorted(rows)]).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one, also after a power cut.

    Temporary file in the same folder, fsync, rename, fsync of the folder. UsageError if not writable.
    UTF-8; a lone surrogate (a request's name may hold one) is written as its escape.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A configuration with its proof. All members are plain JSON values.

    `evidence`: metric name -> {value, low, high, n, unit, source: measured | predicted}.
    `quality`: at least {verdict, margin, strata}. `fallback`: {configuration, trigger}.
    """

    model: Mapping[str, Any]
    engine: Mapping[str, Any]
    hardware: Mapping[str, Any]
    workload: Mapping[str, Any]
    read_contract: str
    kernel: str
    codec_constants_sha256: str
    configuration: Mapping[str, Any]
    baseline: Mapping[str, Any]
    evidence: Mapping[str, Any]
    quality: Mapping[str, Any]
    fallback: Mapping[str, Any]
    voided_by: tuple[str, ...] = DEFAULT_VOIDED_BY
    created_at: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How to repeat it: kvtune version, seed, budget, command."""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with the content hash as last key. Raises UsageError on values JSON cannot hold."""
        body: dict[str, Any] = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**body, "content_sha256": _content_hash(body)}

    @property
    def content_sha256(self) -> str:
        return str(self.to_dict()["content_sha256"])

    @property
    def verdict(self) -> str:
        return str(self.quality["verdict"])

    @property
    def knobs(self) -> dict[str, Any]:
        """The searched settings by knob name."""
        return dict(self.configuration["knobs"])

    def cache_config(self) -> CacheConfig:
        """Cache settings for our engine; UsageError if the recipe is for another engine."""
        self._require_own_engine()
        return CacheConfig.from_dict(self.configuration["cache"])

    def scheduler_config(self) -> SchedulerConfig:
        self._require_own_engine()
        return SchedulerConfig.from_dict(self.configuration["scheduler"])

    def engine_config(self) -> EngineConfig:
        self._require_own_engine()
        return EngineConfig.from_dict(self.configuration["engine"])

    def _require_own_engine(self) -> None:
        if self.engine["name"] != "kvtune":
            raise UsageError(
                f"this recipe is for engine {self.engine['name']!r}, not for kvtune's own; "
                "print its command with `kvtune emit`"
            )

    def save(self, path: str | Path) -> Path:
        """Write atomically; returns the path. UsageError if the folder is not writable."""
        path = Path(path)
        write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and verify a recipe. InputFileError when unreadable, foreign, newer or changed by hand."""
        path = Path(path)
        return cls.from_dict(_read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "recipe") -> Self:
        body = dict(data)
        claimed = body.pop("content_sha256", None)
        version = body.get("schema_version")
        if type(version) is not int or version < 1:
            raise InputFileError(f"{source} is not a kvtune recipe: schema_version is {short(version)}")
        if version > SCHEMA_VERSION:
            raise InputFileError(
                f"{source} has schema_version {version}, this kvtune reads up to "
                f"{SCHEMA_VERSION}; update kvtune"
            )
        _check_shape(body, source)
        if claimed != _hash_of_file(body, source):
            raise InputFileError(
                f"{source} was changed after it was proven (content hash differs); run `kvtune tune` again"
            )
        if body["engine"]["name"] == "kvtune":
            check_settings(body, source)
        else:
            check_foreign(body["configuration"], source)
        body["voided_by"] = tuple(body["voided_by"])
        return cls(**body)


def _content_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _hash_of_file(body: Mapping[str, Any], source: str) -> str:
    try:
        return _content_hash(body)
    except (ValueError, TypeError, RecursionError) as error:  # 1e999 parses to infinity
        raise InputFileError(f"{source} is not a kvtune recipe: {error}") from error


def _plain(value: Any) -> Any:
    """Mappings to dicts with string keys, sequences to lists; UsageError on what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_plain_default))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a recipe holds plain finite JSON values only: {error}") from error


def _plain_default(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    if isinstance(value, (set, frozenset)):
        return sorted(cast("set[Any]", value))
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # opening a pipe would wait for whoever writes to it
            found = "a folder" if path.is_dir() else "not a file" if path.exists() else "no such file"
            raise InputFileError(
                f"cannot read recipe {path}: {found}; give the recipe.json `kvtune tune` wrote"
            )
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)  # not what the file said of its size: it may grow
        if len(content) > MAX_FILE_BYTES:
            raise InputFileError(f"{path} is not a kvtune recipe: larger than {MAX_FILE_BYTES >> 20} MiB")
        text = content.decode("utf-8")
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise InputFileError(f"{path} is not a kvtune recipe: not UTF-8 text") from error
        raise InputFileError(f"cannot read recipe {str(path)!a}: no file has such a name") from error
    except OSError as error:
        raise InputFileError(f"cannot read recipe {path}: {error.strerror or error}") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputFileError(f"{path} is not a kvtune recipe: {reason}") from error
    if not isinstance(data, dict):
        raise InputFileError(
            f"{path} is not a kvtune recipe: found {type(data).__name__}, expected an object"
        )
    return cast("dict[str, Any]", data)


_KINDS: Mapping[str, type] = {"read_contract": str, "kernel": str, "codec_constants_sha256": str,
                              "created_at": str, "schema_version": int, "voided_by": list}  # fmt: skip


def _check_shape(body: Mapping[str, Any], source: str) -> None:
    names = {f.name for f in dataclasses.fields(Recipe)}
    for name in sorted(names - set(body)):
        raise InputFileError(f"{source} is not a whole recipe: {name} is missing")
    for name in sorted(set(body) - names):
        raise InputFileError(f"{source} is not a kvtune recipe: unknown member {short(name)}")
    for name, value in body.items():
        kind = _KINDS.get(name, dict)
        if not isinstance(value, kind):
            raise InputFileError(f"{source}: {name} must be {kind.__name__}, found {short(value)}")
    if not all(isinstance(reason, str) for reason in body["voided_by"]):
        raise InputFileError(f"{source}: voided_by must hold texts")
    for section in ("knobs", "cache", "scheduler", "engine"):
        if not isinstance(body["configuration"].get(section), dict):
            raise InputFileError(f"{source}: configuration.{section} is missing or not an object")
    if not isinstance(body["engine"].get("name"), str):
        raise InputFileError(f"{source}: engine.name is missing")
    if body["quality"].get("verdict") not in VERDICTS:
        raise InputFileError(
            f"{source}: quality.verdict must be one of {', '.join(VERDICTS)}, "
            f"found {short(body['quality'].get('verdict'))}"
        )
