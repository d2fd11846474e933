"""`kvtune report`: redraw the page and its Markdown from the JSON that a run left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kvtune.cli.screen import say
from kvtune.errors import InputFileError

__all__ = ["redacted", "report"]

RESULT = "result.json"
MAX_FILE_BYTES = 256 * 2**20
TEXTS = ("prompt_end", "baseline", "winner")
JUDGED_TEXTS = ("baseline_answer", "candidate_answer")
REDACTED = "(redacted)"


def report(
    result: Annotated[
        Path, typer.Argument(help="result.json of `kvtune tune`, or its folder.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html and report.md; default beside it.")
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out prompts and answers, to share the page.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> int:
    """Redraw report.html and report.md from a result's JSON alone: no model, no engine, no network."""
    from kvtune.recipe import write_atomically
    from kvtune.report import render, render_markdown

    source = result / RESULT if result.is_dir() else result
    record = _read(source)
    folder = source.parent if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFileError(f"cannot write to {folder}: {error.strerror or error}") from error
    shown = redacted(record) if redact else record
    page, text = folder / "report.html", folder / "report.md"
    write_atomically(page, render(shown))
    write_atomically(text, render_markdown(shown))
    if as_json:
        verdict = cast("Mapping[str, Any]", record["quality"]).get("verdict")
        files = {"result": str(source), "html": str(page), "markdown": str(text)}
        print(json.dumps({"schema_version": 1, **files, "verdict": verdict, "redacted": redact}))
    else:
        say(f"report      {page}\nmarkdown    {text}")
    return 0


def redacted(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what users wrote or models answered; numbers and names of requests stay."""
    shown: dict[str, Any] = json.loads(json.dumps(record))
    _blank(shown.get("answers_side_by_side"), "samples", TEXTS)
    _blank(_inside(shown.get("quality"), "answers"), "requests", JUDGED_TEXTS)
    for rejected in shown.get("rejected") or []:
        _blank(_inside(_inside(rejected, "quality"), "answers"), "requests", JUDGED_TEXTS)
    return shown


def _inside(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _blank(holder: Any, name: str, keys: tuple[str, ...]) -> None:
    for entry in _inside(holder, name) or []:
        if isinstance(entry, dict):
            fields = cast("dict[str, Any]", entry)
            fields.update((key, REDACTED) for key in keys if key in fields)


def _read(path: Path) -> dict[str, Any]:
    """InputFileError for what is not the result of a tuning run, in a line."""
    try:
        if not path.is_file():
            raise InputFileError(f"cannot read {path}: no such file; give the {RESULT} `kvtune tune` wrote")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputFileError(f"{path} is not a tuning result: larger than {MAX_FILE_BYTES >> 20} MiB")
        data: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputFileError(f"{path} is not a tuning result: {reason}") from error
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    missing = next(
        (name for name in ("winner", "baseline", "quality") if not isinstance(fields.get(name), dict)), None
    )
    if missing is not None:
        raise InputFileError(
            f"{path} is not a tuning result: it has no {missing}; give {RESULT}, not the recipe"
        )
    return fields
